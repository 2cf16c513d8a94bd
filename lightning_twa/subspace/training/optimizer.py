"""The optimizer that moves a model inside a subspace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.config import SolverConfig, as_config, check_unit_of_steps
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.training.exchange import Exchange, OneProcess
from lightning_twa.subspace.training.parametrizations import make_parametrization, pull_back
from lightning_twa.subspace.training.schedules import peak_within, schedule_factor
from lightning_twa.subspace.training.solvers import limit_step, make_solver

__all__ = ["SubspaceOptimizer"]

RADIUS = 2.0  # standard deviations


class SubspaceOptimizer(Optimizer):
    """Train averaging coefficients by back-propagation through the model (arXiv 2205.13104v4, alg.
    1).

    ``step()`` projects the parameters' gradients onto the subspace, lets the solver step the
    coefficients, and writes the parameters. Making it writes the center, the uniform average, into
    them. Parameters, gradients and ``zero_grad`` are used as with any other optimizer; so are
    gradient clipping and ``GradScaler``.

    Args:
        params: ``model.named_parameters()``, or parameters in the layout's order. Parameters that
            the subspace does not span are not touched.
        subspace: Made by :func:`~lightning_twa.build_subspace`.
        solver: How the coefficients are trained.
        total_steps: Optimizer steps of the whole phase, which the schedule and ``radius`` need. May
            be left out with ``schedule="constant"`` and ``lr``.
        exchange: How several processes take a step together; see
            :mod:`lightning_twa.subspace.training.exchange`. By default each process uses the
            gradient it has, which is right for one process, and where gradients are averaged
            elsewhere.

    Attributes:
        raw: ``(m, B)`` float64 on the CPU, what the solver steps: the coefficients themselves
            unless ``SubspaceConfig.parametrization`` says otherwise; zero at the start.
        radius: Step budget; without meaning where ``SolverConfig.lr`` is given.
        steps: Optimizer steps taken.
        last_lr: Learning rate of the last step taken; ``param_groups`` hold that of the next.
        path_length: ``(B,)`` float64, the length of the path of each block's raw parameters.
        skipped_steps: Steps not taken because the gradient was not finite.

    Raises:
        ValueError: When parameters and subspace do not match, or ``total_steps`` is needed.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        subspace: Subspace,
        solver: SolverConfig | None = None,
        *,
        total_steps: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        solver = as_config("solver", solver, SolverConfig)
        _check(subspace, solver, total_steps)
        self._outputs = _match(params, subspace)
        self.subspace = subspace
        self.config = solver
        self.total_steps = total_steps
        self.exchange = exchange or OneProcess()
        self.steps = 0
        self.skipped_steps = 0
        self.last_lr = 0.0
        self.path_length = torch.zeros(subspace.num_blocks, dtype=torch.float64, device="cpu")
        self.radius = RADIUS if solver.radius is None else solver.radius
        if solver.lr is not None:
            self.peak_lr = float(solver.lr)
        else:
            assert total_steps is not None
            self.peak_lr = peak_within(solver, self.radius, 0, total_steps)
        self.parametrization = make_parametrization(subspace)
        self.raw = torch.zeros(self.parametrization.shape, dtype=torch.float64, device="cpu")
        self._solver = make_solver(solver, self.raw, self.peak_lr)
        # lr, momentum and weight_decay are in the group for those who log them.
        defaults = {
            "lr": self.peak_lr * schedule_factor(solver, 0, total_steps),
            "weight_decay": solver.weight_decay,
            "momentum": solver.momentum if solver.name == "sgd" else solver.betas[0],
        }
        super().__init__(self._outputs, defaults)
        self.write_parameters()

    @property
    def coefficients(self) -> Tensor:
        """``(k, B)`` float64 on the CPU, ``x``; zero at the uniform average."""
        return self.parametrization.coefficients(self.raw)

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Write ``theta(x)`` into the parameters."""
        self._write(self.coefficients)

    def _write(self, coefficients: Tensor) -> None:
        self.exchange.expand(self.subspace, coefficients.detach(), self._outputs)

    @property
    def averaging_weights(self) -> Tensor:
        """``(n, B)`` float64 ``beta``, with parameters equal to ``sum_i beta[i] * candidate_i``."""
        return self.parametrization.averaging_weights(self.raw)

    @property
    def coefficient_norm(self) -> float:
        """Distance of the coefficients from the center, the root mean square over the blocks.

        In standard deviations of the candidates with ``basis="pca"``.
        """
        return float(self.coefficients.square().sum(dim=0).mean().sqrt())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step in the subspace.

        Without any gradient nothing moves. With a gradient that is not finite the step is skipped,
        with a warning, and counted in ``skipped_steps``. Also where the closure sees other weights
        (``parametrization="mask"``, ``sam_rho``), those of :attr:`coefficients` are in the
        parameters when it returns or raises.

        Args:
            closure: Re-evaluates the model and returns the loss; it is called first, and with
                ``sam_rho`` again at the perturbed weights.

        Returns:
            The closure's value, of its first call.

        Raises:
            ValueError: Without a closure where one is needed.
        """
        moves_weights = self.parametrization.samples or self.config.sam_rho > 0
        if closure is None:
            gradient = self.exchange.project(self.subspace, self._outputs)
            if gradient is None:
                return None
            if float(self.param_groups[0]["lr"]) == 0.0 and not bool(gradient.any()):
                return None  # somebody (torch.distributed.checkpoint) only wants to see a state
            if moves_weights:
                raise ValueError(
                    "step() needs a closure with parametrization='mask' and with sam_rho: the loss "
                    "is evaluated at other weights than the model's. Pass one, or use "
                    "parametrization='free' and sam_rho=0."
                )
            self._advance(self._pull_back(self.raw, gradient))
            return None
        if not moves_weights:
            with torch.enable_grad():
                loss = closure()
            gradient = self.exchange.project(self.subspace, self._outputs)
            if gradient is not None:
                self._advance(self._pull_back(self.raw, gradient))
            return loss
        try:
            loss, gradient = self._evaluate(self.raw, closure)
            rho = self.config.sam_rho
            norm = 0.0 if gradient is None else float(gradient.norm())
            if rho > 0 and gradient is not None and 0 < norm < float("inf"):
                # Foret et al., arXiv 2010.01412, on the coefficients
                _, gradient = self._evaluate(self.raw + rho * gradient / norm, closure)
        finally:
            self.write_parameters()
        if gradient is not None:
            self._advance(gradient)
        return loss

    def _evaluate(self, raw: Tensor, closure: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """The closure's value at raw parameters, and the gradient in them."""
        self._write(self.parametrization.sample(raw, self.steps, self._progress()))
        with torch.enable_grad():
            loss = closure()
        gradient = self.exchange.project(self.subspace, self._outputs)
        return loss, None if gradient is None else self._pull_back(raw, gradient)

    def _progress(self) -> float:
        """Of the phase, in [0, 1]; half where its length is not known."""
        return 0.5 if self.total_steps is None else min(self.steps / self.total_steps, 1.0)

    def _pull_back(self, raw: Tensor, gradient: Tensor) -> Tensor:
        return pull_back(self.parametrization, raw, gradient, self.steps, self._progress())

    def _advance(self, gradient: Tensor) -> None:
        """Step with a gradient of the raw parameters, if it is finite; write the parameters."""
        if not bool(torch.isfinite(gradient).all()):
            self.skipped_steps += 1
            warnings.warn(
                f"The gradient at optimizer step {self.steps} of the TWA phase is not finite; the "
                f"step is skipped ({self.skipped_steps} so far) and the weights stay as they are.",
                stacklevel=3,
            )
            return
        self._step_raw(gradient)
        self.write_parameters()

    def _step_raw(self, gradient: Tensor) -> None:
        """Let the solver move ``r``, and hold each block's step to its share of the budget."""
        group = self.param_groups[0]
        # Where the schedule has a length the learning rate is its own: a module that sets the rate
        # of "its" optimizer at every step (a warm-up, say) must not change the budget.
        lr = float(group["lr"]) if self.total_steps is None else self._scheduled_lr()
        before = self.raw.clone()
        self._solver.param_groups[0]["lr"] = lr
        self.raw.grad = gradient
        self._solver.step()
        self.raw.grad = None
        # Adam's steps are about one unit long, not at most one: the radius is a promise.
        longest = lr if self.config.lr is None else None
        self.path_length += limit_step(before, self.raw, longest)
        self.last_lr = lr
        self.steps += 1
        if self.total_steps is not None:
            group["lr"] = self._scheduled_lr()

    def _scheduled_lr(self) -> float:
        return self.peak_lr * schedule_factor(self.config, self.steps, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, solver state and step count: tensors, numbers, strings, lists, dicts.

        A copy: later steps do not change it.
        """
        return {
            "coefficients": self.raw.clone(),
            "path_length": self.path_length.clone(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "total_steps": self.total_steps,
            "peak_lr": self.peak_lr,
            "lr": float(self.param_groups[0]["lr"]),
            "solver": copy.deepcopy(self._solver.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the parameters are written. With other
        ``total_steps`` than before, what is left of the radius is divided among the steps left.

        Raises:
            ValueError: When the state belongs to a subspace of another size.
        """
        coefficients = state_dict["coefficients"]
        if coefficients.shape != self.raw.shape:
            raise ValueError(
                f"The state has coefficients of shape {tuple(coefficients.shape)}, but this "
                f"subspace needs {tuple(self.raw.shape)} (directions, blocks)."
            )
        self.raw.copy_(coefficients)
        self.path_length = state_dict["path_length"].clone()
        self.steps = state_dict["steps"]
        self.skipped_steps = state_dict["skipped_steps"]
        self._solver.load_state_dict(copy.deepcopy(state_dict["solver"]))
        if self.total_steps is None:
            self.param_groups[0]["lr"] = state_dict["lr"]
        else:
            if state_dict.get("total_steps", self.total_steps) == self.total_steps:
                self.peak_lr = state_dict.get("peak_lr", self.peak_lr)
            elif self.config.lr is None:
                left = self.radius - float(self.path_length.max())
                peak = peak_within(self.config, left, self.steps, self.total_steps)
                self.peak_lr = min(self.peak_lr, peak)
            self.param_groups[0]["lr"] = self._scheduled_lr()
        self.write_parameters()


def _check(subspace: Subspace, solver: SolverConfig, total_steps: int | None) -> None:
    """Raise where the solver's configuration does not go with the subspace or the length."""
    check_unit_of_steps(subspace.config, solver)
    if solver.name == "uniform":
        raise ValueError(
            "SolverConfig(name='uniform') trains no coefficients. Use an Adam solver or SGD; "
            "lightning_twa.average() gives a uniform average."
        )
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"Invalid {total_steps=}. Must be an int >= 1.")
    if total_steps is None and (solver.lr is None or solver.schedule != "constant"):
        raise ValueError(
            f"total_steps is needed for schedule={solver.schedule!r} and for a radius. Pass the "
            f"number of optimizer steps of the phase, or SolverConfig(schedule='constant', "
            f"lr=...)."
        )


def _match(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], subspace: Subspace
) -> list[Tensor]:
    """The parameters in the layout's order, by name where names are given."""
    given = list(params)
    specs = subspace.layout.specs
    if given and isinstance(given[0], tuple):
        named: dict[str, Tensor] = dict(given)  # type: ignore[arg-type]
        missing = [spec.name for spec in specs if spec.name not in named]
        if missing:
            raise ValueError(
                f"The subspace spans {missing[0]!r}, which is not among the parameters given"
                f"{_and_more(missing)}. Build it with names=[name for name, _ in "
                f"model.named_parameters()]."
            )
        outputs = [named[spec.name] for spec in specs]
    else:
        outputs = given  # type: ignore[assignment]
        if len(outputs) != len(specs):
            raise ValueError(
                f"Got {len(outputs)} parameters, but the subspace spans {len(specs)} tensors. "
                f"Pass model.named_parameters() to match them by name."
            )
    for spec, parameter in zip(specs, outputs, strict=True):
        if parameter.shape != spec.shape:
            raise ValueError(
                f"The parameter for {spec.name!r} has shape {tuple(parameter.shape)}, but the "
                f"candidates have {tuple(spec.shape)}. Pass model.named_parameters() to match "
                f"them by name."
            )
    return outputs


def _and_more(names: list[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
