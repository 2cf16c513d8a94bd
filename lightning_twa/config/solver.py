"""How the coefficients are trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lightning_twa.config.reading import read_fields
from lightning_twa.config.subspace import SubspaceConfig
from lightning_twa.config.values import check_choice, is_real

__all__ = ["SolverConfig", "check_unit_of_steps"]

SOLVERS = ("full_matrix_adam", "adamw", "sgd", "uniform")
SCHEDULES = ("cosine", "linear", "step", "constant")


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How the coefficients are trained.

    Args:
        name: ``"full_matrix_adam"``, ``"adamw"`` or ``"sgd"``. Or ``"uniform"``, which trains
            nothing: ordinary training goes on to the end of the run, the weights from
            ``CollectConfig.start`` (``None``: from ``start_epoch``) on are candidates, and the run
            ends with their uniform average: SWA, or, with ``max_candidates``, LAWA.
        radius: Step budget: the length of the path of each block's coefficients over the whole
            phase is at most this, in standard deviations of the candidates (``basis="pca"``), so
            the learning rate is ``radius / sum(schedule factors)``. ``None`` means 2, 1 where
            held-out data choose the start, and in a soup (``start_epoch=0``) ``2 sqrt(n)``: among
            runs that are no steps of one way the best may be a single one, and those lie
            ``sqrt(n - 1)`` from their mean. Not used when ``lr`` is given.
        lr: Peak learning rate of the coefficients, instead of ``radius``. Required for ``"sgd"``
            and for every basis but ``"pca"``, where steps have no common unit.
        schedule: ``"cosine"`` to zero, ``"linear"`` to zero, ``"step"`` (a tenth at 50 % and again
            at 75 % of the phase), or ``"constant"``.
        warmup: Fraction of the phase's optimizer steps over which the learning rate rises linearly.
        weight_decay: Pull of the coefficients towards the uniform average; decoupled from the
            gradient for the Adam solvers, added to it for ``"sgd"``, as in ``torch.optim``.
        momentum: Momentum of ``"sgd"``.
        betas: Decay rates of the first and second moment of the Adam solvers.
        sam_rho: Radius of sharpness-aware minimization (Foret et al., arXiv 2010.01412) on the
            coefficients: the gradient is taken so far up the slope, which doubles the cost of a
            step. 0 turns it off.

    Raises:
        ValueError: When a value is outside its range, or given to a solver that does not use it.
    """

    name: Literal["full_matrix_adam", "adamw", "sgd", "uniform"] = "full_matrix_adam"
    radius: float | None = None
    lr: float | None = None
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup: float = 0.2
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    sam_rho: float = 0.0

    def __post_init__(self) -> None:
        read_fields(self)
        check_choice("SolverConfig.name", self.name, SOLVERS)
        check_choice("SolverConfig.schedule", self.schedule, SCHEDULES)
        for field in ("radius", "lr"):
            value = getattr(self, field)
            if value is not None and not (is_real(value) and value > 0):
                other = "None (by radius)" if field == "lr" else "None (the default)"
                raise ValueError(
                    f"Invalid SolverConfig.{field}={value!r}. Must be a number > 0, or {other}."
                )
        for field, value in (("warmup", self.warmup), ("momentum", self.momentum)):
            if not (is_real(value) and 0 <= value < 1):
                raise ValueError(
                    f"Invalid SolverConfig.{field}={value!r}. Must be a number in [0, 1)."
                )
        for field in ("weight_decay", "sam_rho"):
            value = getattr(self, field)
            if not (is_real(value) and value >= 0):
                raise ValueError(f"Invalid SolverConfig.{field}={value!r}. Must be a number >= 0.")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        if not pair or not all(is_real(b) and 0 <= b < 1 for b in self.betas):
            raise ValueError(
                f"Invalid SolverConfig.betas={self.betas!r}. Must be two numbers in [0, 1), "
                f"such as (0.9, 0.999)."
            )
        self._check_unused()

    def _check_unused(self) -> None:
        """An option that the chosen solver would ignore is an error."""
        if self.name == "uniform":
            for field in fields(self):
                if field.name != "name" and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"SolverConfig.{field.name}={getattr(self, field.name)!r} has no meaning "
                        f"with name='uniform', which trains nothing. Leave it out."
                    )
        if self.lr is None and self.name == "sgd":
            raise ValueError(
                "SolverConfig.name='sgd' needs lr: its step has the scale of the gradient, so a "
                "radius in standard deviations has no meaning. Pass lr=..., or use an Adam solver."
            )
        if self.lr is not None and self.radius is not None:
            raise ValueError(
                f"SolverConfig got lr={self.lr} and radius={self.radius}. Give one of them."
            )
        if self.name != "sgd" and self.momentum != 0.9:
            raise ValueError(
                f"SolverConfig.momentum={self.momentum} needs name='sgd', but name={self.name!r}. "
                f"Use betas."
            )
        if self.name == "sgd" and tuple(self.betas) != (0.9, 0.999):
            raise ValueError(
                f"SolverConfig.betas={self.betas} needs an Adam solver, but name='sgd'. Use "
                f"momentum."
            )


def check_unit_of_steps(subspace: SubspaceConfig, solver: SolverConfig) -> None:
    """A radius is measured in standard deviations, which only the ``pca`` basis is scaled to.

    Raises:
        ValueError: When another basis goes with a radius.
    """
    if subspace.basis != "pca" and solver.lr is None and solver.name != "uniform":
        raise ValueError(
            f"SubspaceConfig.basis={subspace.basis!r} needs SolverConfig.lr: only basis='pca' "
            f"measures coefficients in standard deviations, which SolverConfig.radius means."
        )
