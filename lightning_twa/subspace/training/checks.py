"""What an optimizer of coefficients is made with, or loads, has to fit together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_twa.config import SolverConfig, check_unit_of_steps
from lightning_twa.subspace.subspace import Subspace

__all__ = ["check_size", "check_solver", "match"]


def check_size(coefficients: Tensor, raw: Tensor) -> None:
    """Check that loaded coefficients have the shape of those that they are for.

    Raises:
        ValueError: When the state belongs to a subspace of another size.
    """
    if coefficients.shape != raw.shape:
        raise ValueError(
            f"The state has coefficients of shape {tuple(coefficients.shape)}, but this "
            f"subspace needs {tuple(raw.shape)} (directions, blocks)."
        )


def check_solver(subspace: Subspace, solver: SolverConfig, total_steps: int | None) -> None:
    """Check that the solver's configuration goes with the subspace and the length.

    Raises:
        ValueError: Where it does not.
    """
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


def match(
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], subspace: Subspace
) -> list[Tensor]:
    """The parameters in the layout's order, by name where names are given.

    Raises:
        ValueError: When parameters and subspace do not match.
    """
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
