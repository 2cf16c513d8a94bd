"""The optimizer that moves a model inside a subspace.

What it holds lives on the device of the directions. On an accelerator a step copies nothing to the
host and waits for nothing; what decides (whether the gradient is finite) is decided there. What the
host has to know of a step, its place in the schedule and so its rate, it counts itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_twa.config import SolverConfig, as_config
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.tensors import is_accelerator, widest
from lightning_twa.subspace.training import saved
from lightning_twa.subspace.training.checks import check_solver, match
from lightning_twa.subspace.training.exchange import Exchange, OneProcess
from lightning_twa.subspace.training.parametrizations import make_parametrization, pull_back
from lightning_twa.subspace.training.schedules import first_peak, schedule_factor
from lightning_twa.subspace.training.solvers import (
    limit_step,
    make_solver,
    step_where,
    up_the_slope,
)

__all__ = ["SubspaceOptimizer"]

RADIUS = 2.0  # standard deviations
NEEDS_CLOSURE = (
    "step() needs a closure with parametrization='mask' and with sam_rho: the loss is evaluated at "
    "other weights than the model's. Pass one, or use parametrization='free' and sam_rho=0."
)
NOT_FINITE = (
    "The gradient at optimizer step{at} of the TWA phase is not finite; the step is skipped "
    "({skipped} so far) and the weights stay as they are."
)


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
        state: Of :meth:`state_dict`, to continue from; the parameters are then written once.

    Attributes:
        raw: ``(m, B)`` float64 (float32 on devices without that) on the device of the directions,
            what the solver steps: the coefficients themselves unless
            ``SubspaceConfig.parametrization`` says otherwise; zero at the start.
        radius: Step budget; without meaning where ``SolverConfig.lr`` is given.
        attempts: Optimizer steps, those without effect too.
        last_lr: Learning rate of the last of them; ``param_groups`` hold that of the next.
        path_length: ``(B,)``, the length of the path of each block's raw parameters; where ``raw``
            is.

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
        state: dict[str, Any] | None = None,
    ) -> None:
        solver = as_config("solver", solver, SolverConfig)
        check_solver(subspace, solver, total_steps)
        self._outputs = match(params, subspace)
        self.subspace = subspace
        self.config = solver
        self.total_steps = total_steps
        self.exchange = exchange or OneProcess()
        device = subspace.center.device
        self._reads = not is_accelerator(device)  # values, as it goes
        self.attempts = 0
        self._position = 0  # in the schedule
        self._taken = torch.zeros((), dtype=torch.int64, device=device)
        self._told = 0  # of steps without effect
        self.last_lr = 0.0
        self.path_length = torch.zeros(subspace.num_blocks, dtype=widest(device), device=device)
        self.radius = RADIUS if solver.radius is None else solver.radius
        self.peak_lr = first_peak(solver, self.radius, total_steps)
        self.parametrization = make_parametrization(subspace)
        self.raw = torch.zeros(self.parametrization.shape, dtype=widest(device), device=device)
        self._solver = make_solver(solver, self.raw, self.peak_lr)
        # lr, momentum and weight_decay are in the group for those who log them.
        defaults = {
            "lr": self.peak_lr * schedule_factor(solver, 0, total_steps),
            "weight_decay": solver.weight_decay,
            "momentum": solver.momentum if solver.name == "sgd" else solver.betas[0],
        }
        super().__init__(self._outputs, defaults)
        if state is None:
            self.write_parameters()
        else:
            self.load_state_dict(state)

    @property
    def steps(self) -> int:
        """Optimizer steps taken. Reading it waits for the device, as the other properties do."""
        return int(self._taken)

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because the gradient was not finite."""
        return self.attempts - self.steps

    @property
    def coefficients(self) -> Tensor:
        """``(k, B)``, ``x``, where :attr:`raw` is; zero at the uniform average. No waiting."""
        return self.parametrization.coefficients(self.raw)

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Write ``theta(x)`` into the parameters."""
        self._write(self.coefficients)

    def _write(self, coefficients: Tensor) -> None:
        self.exchange.expand(self.subspace, coefficients.detach(), self._outputs)

    @property
    def averaging_weights(self) -> Tensor:
        """``(n, B)`` ``beta``, with parameters equal to ``sum_i beta[i] * candidate_i``; where
        :attr:`raw` is. No waiting.
        """
        return self.parametrization.averaging_weights(self.raw)

    @property
    def coefficient_norm(self) -> float:
        """Distance of the coefficients from the center, the root mean square over the blocks.

        In standard deviations of the candidates with ``basis="pca"``.
        """
        return float(self.distance)

    @property
    def distance(self) -> Tensor:
        """:attr:`coefficient_norm` as a tensor without dimensions, for logging. No waiting."""
        return self.coefficients.square().sum(dim=0).mean().sqrt()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step in the subspace.

        Without any gradient nothing moves. With a gradient that is not finite the step is skipped
        and counted in ``skipped_steps``, with a warning: at once on the CPU, else by :meth:`look`.
        Its place in the schedule is used up. Also where the closure sees other weights
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
                raise ValueError(NEEDS_CLOSURE)
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
            up = None if gradient is None else up_the_slope(self.raw, gradient, self.config.sam_rho)
            if up is not None:
                _, gradient = self._evaluate(up, closure)
        finally:
            self.write_parameters()
        if gradient is not None:
            self._advance(gradient)
        return loss

    def _evaluate(self, raw: Tensor, closure: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """The closure's value at raw parameters, and the gradient in them."""
        self._write(self.parametrization.sample(raw, self._position, self._progress()))
        with torch.enable_grad():
            loss = closure()
        gradient = self.exchange.project(self.subspace, self._outputs)
        return loss, None if gradient is None else self._pull_back(raw, gradient)

    def _progress(self) -> float:
        """Of the phase, in [0, 1]; half where its length is not known."""
        return 0.5 if self.total_steps is None else min(self._position / self.total_steps, 1.0)

    def _pull_back(self, raw: Tensor, gradient: Tensor) -> Tensor:
        return pull_back(self.parametrization, raw, gradient, self._position, self._progress())

    def _advance(self, gradient: Tensor) -> None:
        """Step with a gradient of the raw parameters, where it is finite; write the parameters."""
        group = self.param_groups[0]
        # Where the schedule has a length the learning rate is its own: a module that sets the rate
        # of "its" optimizer at every step (a warm-up, say) must not change the budget.
        lr = float(group["lr"]) if self.total_steps is None else self._scheduled_lr()
        self._solver.param_groups[0]["lr"] = lr
        self.raw.grad = gradient
        ok = torch.linalg.vector_norm(gradient, float("inf")) < float("inf")
        # Adam's steps are about one unit long, not at most one: the radius is a promise.
        limited = self.config.lr is None
        goes = True
        if not self._reads:
            step_where(self._solver, self.raw, ok, self.path_length, limited=limited)
        elif goes := bool(ok):
            before = self.raw.clone()
            self._solver.step()
            self.path_length += limit_step(before, self.raw, lr if limited else None)
        self.raw.grad = None
        self._taken += ok
        self.attempts += 1
        self._position += 1
        if self.total_steps is not None:
            group["lr"] = self._scheduled_lr()
        if not goes:
            self.look()
            return
        self.last_lr = lr
        self.write_parameters()

    def look(self) -> None:
        """Warn of steps without effect since the last look; waits for the device. On the CPU every
        step does it.

        Raises:
            CommonError: On every process, when a gradient could not be projected on one.
        """
        self.exchange.look()
        skipped = self.skipped_steps
        if skipped > self._told:
            at = f" {self._position - 1}" if self._reads else f"s before {self._position}"
            warnings.warn(NOT_FINITE.format(at=at, skipped=skipped), stacklevel=3)
        self._told = skipped

    def _scheduled_lr(self) -> float:
        return self.peak_lr * schedule_factor(self.config, self._position, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, solver state and step count: tensors, numbers, strings, lists, dicts.

        A copy, on the CPU and in float64 wherever the optimizer works: later steps do not change
        it.
        """
        return saved.state_of(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the parameters are written. With other
        ``total_steps`` than before, what is left of the radius is divided among the steps left.

        Raises:
            ValueError: When the state belongs to a subspace of another size.
        """
        saved.load(self, state_dict)
        self.write_parameters()
