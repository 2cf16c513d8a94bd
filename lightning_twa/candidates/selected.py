"""Which of a model's tensors are averaged, where patterns of names say so."""

from __future__ import annotations

from torch import nn

from lightning_twa.candidates.candidate import further_names, is_kept, persistent_buffers
from lightning_twa.candidates.readers import without_wrappers
from lightning_twa.config import CollectConfig, matches

__all__ = ["averaged_names", "check_selection"]


def averaged_names(module: nn.Module, collect: CollectConfig) -> set[str] | None:
    """Names of the parameters and buffers that are averaged, as candidates have them; ``None``
    where all are.
    """
    if not collect.selects:
        return None
    return {own for own, names in _all_names(module).items() if collect.averages(names)}


def check_selection(module: nn.Module, collect: CollectConfig) -> None:
    """Check that every pattern is of a parameter, and that something is averaged.

    Raises:
        ValueError: Naming the pattern that is of none.
    """
    if not collect.selects:
        return
    all_names = _all_names(module)
    names = [n for own in all_names for n in sorted(all_names[own])]
    for field in ("include", "exclude"):
        for pattern in getattr(collect, field) or ():
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"CollectConfig.{field}={pattern!r} is the name of no parameter: there are "
                    f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}. A pattern is of "
                    f"a whole name ('*.bias'), or of a module ('encoder.layers.0')."
                )
    own_names = averaged_names(module, collect) or set()
    trained = {n for n, p in module.named_parameters() if p.requires_grad and is_kept(p)}
    if trained and not trained & own_names:
        raise ValueError(
            f"CollectConfig(include={collect.include!r}, exclude={collect.exclude!r}) leaves none "
            f"of the {len(trained)} trained parameters to be averaged. Exclude fewer."
        )


def _all_names(module: nn.Module) -> dict[str, set[str]]:
    """Names of each parameter and buffer: those of tied ones, and each without wrappers."""
    own = [*dict(module.named_parameters()), *persistent_buffers(module)]
    result = {name: {name, without_wrappers(name)} for name in own}
    for name, other in further_names(module).items():
        result[other] |= {name, without_wrappers(name)}
    return result
