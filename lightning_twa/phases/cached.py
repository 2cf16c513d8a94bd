"""The subspace of a phase in files, for a run that is resumed in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_twa.candidates import Store, SubspaceFiles, name_of_subspace
from lightning_twa.config import Settings
from lightning_twa.machine import say
from lightning_twa.phases.ranks import Sharing
from lightning_twa.subspace import Subspace, restore_subspace

__all__ = ["CachedSubspace"]


class CachedSubspace:
    """Files of the subspace that is trained in, where ``StorageConfig(cache_subspace=True)`` wants
    them; else nothing happens. Every process calls every method but :meth:`state_dict`.

    Args:
        settings: The arguments of the callback.
        trainer: The Trainer.
        store: The candidates.
        share: How processes share the work.
    """

    def __init__(self, settings: Settings, trainer: Trainer, store: Store, share: Sharing) -> None:
        self._config = settings.subspace
        self._columns = share.columns
        self._device = trainer.strategy.root_device
        self._files: SubspaceFiles | None = None
        if settings.storage.cache_subspace:
            assert store.root is not None, "resolve() has made the store"
            self._files = SubspaceFiles(store.root, share.columns, self._device)

    def read_or_build(
        self,
        kept: Mapping[str, Any] | None,
        names: Sequence[str],
        build: Callable[[Tensor | None], Subspace],
        *,
        starts_at_mean: bool,
    ) -> Subspace:
        """The subspace of a phase, which is written where it had to be built.

        Args:
            kept: What the phase goes on from, if it does.
            names: Of the candidates that the subspace spans.
            build: Builds it; with the mixing, ``(B, k, n)``, of a phase that goes on.
            starts_at_mean: Whether it has no start of its own.
        """
        mixing = None
        if kept is not None:
            mixing = kept["mixing"]
            name = self._name(mixing, names, starts_at_mean)
            found = self._read(kept.get("subspace"), name, mixing, starts_at_mean)
            if found is not None:
                return found
        built = build(mixing)
        if self._files is not None:
            name = self._name(built.mixing, names, starts_at_mean)
            self._files.write(built.state_dict(), name)
        return built

    def _read(self, files: Any, name: str, mixing: Tensor, starts_at_mean: bool) -> Subspace | None:
        """The subspace from its files; ``None`` where there are none that can be used."""
        if self._files is None or not files:
            return None
        tensors = self._files.read(files, name)
        if tensors is None:
            return None
        try:
            return restore_subspace(
                tensors,
                self._config,
                self._columns,
                mixing,
                starts_at_mean=starts_at_mean,
                device=self._device,
                shares=True,
            )
        except ValueError as error:
            say(f"TWA: the subspace is built again, because its file is of another one: {error}")
            return None

    def _name(self, mixing: Tensor, names: Sequence[str], starts_at_mean: bool) -> str:
        return name_of_subspace(
            self._config, self._columns, mixing, names, starts_at_mean=starts_at_mean
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        files = [] if self._files is None else self._files.state_dict()
        return {"subspace": files} if files else {}

    def delete(self) -> None:
        """The phase is over."""
        if self._files is not None:
            self._files.delete()
