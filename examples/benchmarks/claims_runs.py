"""What the rows of the claims benchmark are made of: fixed averages, learning-rate drops, scores.

A fixed average is a profile: how much the weights after each optimizer step of a run count. All of
them come from one ordinary run. Nothing here uses ``lightning_twa``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import torch
from claims_data import Batch, Data
from claims_tasks import Learner, Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import update_bn

from lightning_twa import TWACallback

EMA_DECAYS = (0.9, 0.97, 0.99, 0.995, 0.998)  # per optimizer step
SIGMAS = (0.02, 0.056, 0.13, 0.23)  # relative widths of power averages
WINDOWS = (2, 4, 8, 16)  # snapshots
STATISTICS = 50  # batches for BatchNorm; docs/benchmarks.md says why that is enough
LAST = "last weights"

Row = dict[str, Any]

# --- profiles


def exponent(sigma: float) -> float:
    """``gamma`` that gives ``sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        wide = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > sigma
        low, high = (middle, high) if wide else (low, middle)
    return low


def tail(steps: int, count: int) -> Tensor:
    """The mean of the last ``count`` steps."""
    profile = torch.zeros(steps, dtype=torch.float64)
    profile[steps - count :] = 1 / count
    return profile


def ema(steps: int, decay: float) -> Tensor:
    """``decay ** age``, normalised."""
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    powers = decay**ages
    return powers / powers.sum()


def power(steps: int, sigma: float) -> Tensor:
    """What ``a += (1 - (1 - 1/s)**(gamma + 1)) * (w_s - a)`` gives, in closed form."""
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (exponent(sigma) + 1)
    return edges.diff()


def decay_curve(steps: int, count: int) -> Tensor:
    """The average that stands for a rate that falls as ``1 - sqrt(u)`` over the last ``count``
    steps (arXiv 2507.17634): the update of a step counts by the curve in its middle.
    """
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    curve = torch.cat([torch.ones(1, dtype=torch.float64), 1 - u.sqrt(), torch.zeros(1)])
    profile = torch.zeros(steps, dtype=torch.float64)
    profile[steps - count - 1 :] = -curve.diff()
    return profile


def profiles(steps: int, interval: int) -> dict[str, Tensor]:
    """By title, ``(steps,)`` float64 with the sum 1; entry ``s - 1`` is of the weights after step
    ``s``. A snapshot is taken every ``interval`` steps.
    """
    found = {
        LAST: tail(steps, 1),
        "uniform, all steps": tail(steps, steps),
        "uniform, last half": tail(steps, steps // 2),
        "uniform, last quarter": tail(steps, steps // 4),
    }
    for count in WINDOWS:
        if count * interval <= steps:
            end = steps - steps % interval
            profile = torch.zeros(steps, dtype=torch.float64)
            profile[end - 1 - (count - 1) * interval : end : interval] = 1 / count
            found[f"last {count} snapshots"] = profile
    found |= {f"EMA {decay}": ema(steps, decay) for decay in EMA_DECAYS}
    found |= {f"power average {sigma}": power(steps, sigma) for sigma in SIGMAS}
    found["1 - sqrt, last half"] = decay_curve(steps, steps // 2)
    found["1 - sqrt, last tenth"] = decay_curve(steps, steps // 10)
    return found


# --- callbacks


class Recorder(L.Callback):
    """Sums the weights after every step by profiles, in float32, and keeps the last ones.

    Args:
        profiles: As from :func:`profiles`; steps after their length are not looked at.
    """

    def __init__(self, profiles: dict[str, Tensor]) -> None:
        self.titles = list(profiles)
        self.coefficients = torch.stack(list(profiles.values()), dim=1).float()
        self.sums = torch.empty(0)
        self.last: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add the weights."""
        step, steps = trainer.global_step, len(self.coefficients)
        if step > steps:
            return
        weights = parameters_to_vector(pl_module.parameters())
        if not self.sums.numel():
            self.sums = torch.zeros(len(self.titles), len(weights))
        self.sums.addr_(self.coefficients[step - 1], weights)
        if step == steps:
            self.last = copy.deepcopy(pl_module.state_dict())

    def put(self, title: str, module: Learner, data: Data) -> None:
        """Load an average, with BatchNorm statistics for it; the last weights keep theirs."""
        module.load_state_dict(self.last)
        if title != LAST:
            vector_to_parameters(self.sums[self.titles.index(title)], module.parameters())
            reestimate(module, data)


class Drop(L.Callback):
    """After a step a copy of the model goes on beside it, on the same batches, while its learning
    rate falls linearly to 0.

    Args:
        module: To become the copy; it ends with the annealed weights.
        start: Optimizer steps before it.
        steps: Its length.
        falling: ``False`` keeps the rate, for a test.
    """

    def __init__(self, module: Learner, start: int, steps: int, falling: bool = True) -> None:
        self.module, self.start, self.steps, self.falling = module, start, steps, falling
        self.rates: list[float] = []

    @torch.enable_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        """The scheduler has set the rate of the next step by now."""
        done = trainer.global_step - self.start
        if done == 0:
            self.module.load_state_dict(pl_module.state_dict())
            state = copy.deepcopy(trainer.optimizers[0].state_dict())
            self.optimizer = self.module.recipe.optimizer(self.module.parameters())
            self.optimizer.load_state_dict(state)
            self.rates = [group["lr"] for group in self.optimizer.param_groups]
        elif 0 < done <= self.steps:
            factor = 1 - (done - 1) / self.steps if self.falling else 1.0
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad()
            self.module.training_step(batch, 0).backward()
            self.optimizer.step()


# --- scores


def reestimate(module: nn.Module, data: Data) -> None:
    """Take BatchNorm statistics, if there are any, from the first batches of epoch 0."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        batches = zip(range(STATISTICS), data.train.batches(0), strict=False)
        update_bn((batch for _, batch in batches), module)


def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and NLL in nats, in eval mode and float32."""
    training, correct, nll = module.training, 0.0, 0.0
    module.eval()
    with torch.no_grad():
        for inputs, labels in zip(x.split(250), y.split(250), strict=True):
            logits, target = module(inputs).float().flatten(0, -2), labels.flatten()
            correct += (logits.argmax(dim=1) == target).sum().item()
            nll += F.cross_entropy(logits, target, reduction="sum").item()
    module.train(training)
    return 100 * correct / y.numel(), nll / y.numel()


def scores(module: nn.Module, data: Data, kind: str, steps: int) -> Row:
    """A row: test accuracy in percent and NLL, those on the validation data, and optimizer steps.
    ``kind`` is ``"fixed"`` for an average with fixed weights.
    """
    accuracy, nll = evaluate(module, *data.test.tensors)
    val_accuracy, val_nll = evaluate(module, *data.val.tensors)
    return {
        "accuracy": accuracy,
        "nll": nll,
        "val_accuracy": val_accuracy,
        "val_nll": val_nll,
        "kind": kind,
        "steps": steps,
    }


def default_phase(steps: int) -> int:
    """The length of the phase that the callback takes by default, in steps."""
    return TWACallback().settings.steps_of_phase(steps) or 0


def paper_phase(task: Task) -> int:
    """Five epochs, or, of a run of few, a sixth, the share that five epochs have of thirty."""
    return 5 * task.steps if task.run >= 10 else task.total // 6
