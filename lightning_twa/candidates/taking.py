"""Taking a candidate: the weights of one moment are copied, and a device goes on meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_twa.candidates.background import Background
from lightning_twa.candidates.candidate import Candidate, is_kept
from lightning_twa.candidates.copying import HostCopies, to_cpu
from lightning_twa.candidates.unchanged import all_same
from lightning_twa.subspace import local_part, to_shards

__all__ = ["Taking", "take"]


class Taking:
    """Copies a module's weights, of a sharded one this process's part, to the CPU. Parameters of
    lazy layers that have no values are left out, and it is not finite then.

    A frozen parameter that is as in ``previous`` shares its memory, so that fine-tuning a few
    adapters keeps one copy of the backbone.

    Args:
        module: The model.
        name: Name of the candidate.
        buffers: From :func:`agreed_buffers`.
        previous: The candidate taken before.
        dtype: What trainable parameters are rounded to; ``None`` keeps their own dtype.
        weights: Values that take the place of the module's, by name of the parameter.
        stay: Whether it stays in memory.
        aside: Whether a device may go on meanwhile; else, and where parameters are left out,
            :meth:`wait` is due at once.

    Attributes:
        candidate: The candidate. What a device is sending has no values before :meth:`wait`.
        trained: Names of the parameters that are looked at.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: nn.Module,
        name: str,
        buffers: Mapping[str, Tensor],
        previous: Candidate | None = None,
        dtype: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        stay: bool = True,
        aside: bool = False,
    ) -> None:
        _to_shards(module)
        parameters: dict[str, Tensor] = {}
        trained: dict[str, Tensor] = {}
        frozen: dict[str, tuple[Tensor, torch.dtype]] = {}
        dtypes: list[torch.dtype] = []
        self._complete = True
        for key, parameter in module.named_parameters():
            if is_lazy(parameter):
                self._complete = False
            elif is_kept(parameter):
                own = weights.get(key, parameter) if weights else parameter
                own = own if type(own) is nn.Parameter else local_part(own)
                parameters[key] = own
                if parameter.requires_grad:
                    trained[key] = own
                    dtypes.append(dtype or parameter.dtype)
                    continue
                frozen[key] = (own, parameter.dtype)
        held = {} if previous is None else previous.parameters
        known = [key for key in frozen if key in held]
        unchanged = all_same([held[key] for key in known], [frozen[key][0] for key in known])
        stays = {key for key, is_same in zip(known, unchanged, strict=True) if is_same}
        for key, (own, kept) in frozen.items():
            parameters[key] = held[key] if key in stays else to_cpu(own, kept)
        there = {key: buffer for key, buffer in buffers.items() if not buffer.is_cpu}
        dtypes += [buffer.dtype for buffer in there.values()]
        self.trained = list(trained)
        self._there = list(there)
        self._copies = HostCopies(
            [*trained.values(), *there.values()],
            dtypes,
            look=len(trained),
            stay=stay,
            aside=aside,
        )
        self.candidate = Candidate(name, parameters, dict(buffers))
        self._put()
        self._finite: bool | None = None
        self._rest: Background[bool] | None = None
        if aside and self._complete:
            self._rest = Background(self._copies.finish)

    @property
    def on_its_way(self) -> bool:
        """Whether a device is sending it."""
        return self._rest is not None

    def _put(self) -> None:
        copies = iter(self._copies.copies)
        for name in self.trained:
            self.candidate.parameters[name] = next(copies)
        for name in self._there:
            self.candidate.buffers[name] = next(copies)

    def wait(self) -> bool:
        """Wait until the candidate has its values. May be called again.

        Returns:
            Whether what is trained is known to be finite.

        Raises:
            Exception: What copying has failed with.
        """
        if self._finite is None:
            if self._rest is None:
                found: bool | None = self._copies.finish()
            else:
                found, problem = self._rest.wait()
                if problem is not None:
                    raise problem
            self._put()
            self._finite = (bool(found) or not self.trained) and self._complete
        return self._finite


def take(
    module: nn.Module,
    name: str,
    buffers: Mapping[str, Tensor],
    previous: Candidate | None = None,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Candidate:
    """The candidate of a :class:`Taking` that has been waited for."""
    taking = Taking(module, name, buffers, previous, dtype, weights)
    taking.wait()
    return taking.candidate


def _to_shards(module: nn.Module) -> None:
    """Which takes a while, and is needed where there are processes only."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        to_shards(module)
