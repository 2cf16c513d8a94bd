"""What becomes of a module's parameters while the coefficients are trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_twa.machine import warn
from lightning_twa.subspace import ParameterLayout

__all__ = ["ParameterWatch"]


class ParameterWatch:
    """The parameters at the switch: nothing may take their places, and what is frozen stays so.

    Args:
        module: The model.
        layout: The parameters that the subspace spans.
    """

    def __init__(self, module: nn.Module, layout: ParameterLayout) -> None:
        named = dict(module.named_parameters())
        # whose they are, under which name, and themselves
        self._places: dict[str, tuple[dict[str, Any], str, Any]] = {}
        for spec in layout.specs:
            owner, _, own = spec.name.rpartition(".")
            held = module.get_submodule(owner)._parameters
            self._places[spec.name] = (held, own, named[spec.name])
        others = [(n, p) for n, p in named.items() if n not in self._places]
        self._frozen = [(n, p) for n, p in others if not p.requires_grad]

    def look(self) -> None:
        """After a batch: warn, once, of what was unfrozen.

        Raises:
            ValueError: Naming a parameter that another tensor has replaced.
        """
        replaced = [n for n, (owner, own, p) in self._places.items() if owner.get(own) is not p]
        if replaced:
            raise ValueError(
                f"Parameter {replaced[0]!r} is another tensor than when the phase began: the "
                f"module, or a callback, has made it anew, so that no gradient reaches the "
                f"coefficients. Make parameters anew before start_epoch, or write into them "
                f"(parameter.copy_())."
            )
        thawed = [n for n, p in self._frozen if p.requires_grad]
        if thawed:
            self._frozen = []
            warn(
                f"Parameters were unfrozen in the phase ({len(thawed)}, the first is "
                f"{thawed[0]!r}): nothing trains them. Only averaging coefficients are trained "
                f"from start_epoch on, and these are the same in all candidates. Unfreeze before "
                f"the candidates are collected, or set a later start_epoch."
            )

    def replaced_in(self, module: nn.Module) -> bool:
        """Whether a parameter of the module is another tensor now, of another submodule perhaps."""
        named = dict(module.named_parameters())
        return any(named.get(n) is not p for n, (_, _, p) in self._places.items())
