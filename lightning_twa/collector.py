"""Everything that becomes a candidate: snapshots, running averages, files; and when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa import checks, phase
from lightning_twa.candidates import RunningAverages, Store, average_name, persistent_buffers
from lightning_twa.candidates.readers import find_files, read_candidate_from, unique_names
from lightning_twa.schedule import CollectPlan
from lightning_twa.settings import Settings

__all__ = ["Collector"]


class Collector:
    """The candidates of one run. Every rank goes through the same moments.

    Args:
        settings: The arguments of the callback.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store()
        self.averages = RunningAverages(settings.collect.ema_decays, settings.collect.ema_device)
        self.cycle = 0
        self._plans: list[CollectPlan] = []
        self._files: list[Path] = []
        self._names: list[str] = []  # of the candidates in them

    @property
    def plan(self) -> CollectPlan:
        """The resolved schedule of this cycle."""
        assert self._plans, "set_up() comes before every training hook"
        return self._plans[self.cycle]

    @property
    def names(self) -> list[str]:
        """Names of the candidates, those of running averages once they are complete."""
        return self.store.names

    @property
    def count(self) -> int:
        """Number of candidates, if the phase began now."""
        names = self.store.names
        return len(names) + sum(name not in names for name in self.averages.names)

    def count_after(self, epoch: int) -> int:
        """Number of candidates at the end of an epoch that is not over yet."""
        due = self.plan.takes_epoch_end(epoch) and f"epoch={epoch}" not in self.names
        return self.count + due

    def set_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the settings, resolve the schedule and find files; see
        :mod:`lightning_twa.checks`.
        """
        collect = self.settings.collect
        self._files = [] if collect.checkpoints is None else find_files(collect.checkpoints)
        self._names = [name.replace("/", "-") for name in unique_names(self._files)]
        self._plans = checks.check_trainer(self.settings, trainer, module, len(self._files))
        if len(self.store) > 0:  # the same Trainer goes on
            return
        storage = self.settings.storage
        self.store = Store(
            storage,
            collect.max_candidates,
            root=Path(storage.dirpath or Path(trainer.default_root_dir, "twa_candidates")),
            processes_on_host=trainer.num_devices,
            shards=phase.shards_parameters(trainer),
            keep_named=_keeps_older_checkpoints(trainer),
            device=trainer.strategy.root_device,
        )

    def check_data(self, trainer: Trainer, loader: Any) -> None:
        """See :func:`lightning_twa.checks.check_data`."""
        plans = self._plans[self.cycle :]
        checks.check_data(self.settings, plans, trainer, loader, len(self.store))

    def begin_cycle(self) -> None:
        """Forget the candidates, and collect anew."""
        self.store.clear()
        self.store.max_candidates = self.settings.collect.max_candidates  # a resumed phase had none
        self.averages.clear()
        self.cycle += 1

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """At the start of training; takes a candidate where a resumed run would not.

        A checkpoint that was written after the last batch of an epoch resumes behind that epoch's
        end.

        Raises:
            ValueError: Naming a file that does not hold weights of this module.
        """
        epoch = trainer.current_epoch
        if phase.at_epoch_start(trainer) and self.plan.takes_epoch_end(epoch - 1):
            self._add(module, f"epoch={epoch - 1}")
        for path, name in zip(self._files, self._names, strict=True):
            if name not in self.names:
                parameters = dict(module.named_parameters())
                expected = {**parameters, **persistent_buffers(module)}
                read = read_candidate_from(path, expected, parameters)
                self.store.give(module, name, read.parameters, read.buffers)

    def after_step(self, trainer: Trainer, module: LightningModule) -> None:
        """After a batch: update running averages; take a candidate where one is due by steps."""
        if not phase.step_was_taken(trainer):
            return
        epoch, steps = trainer.current_epoch, trainer.global_step
        if self.plan.collect_start <= epoch < self.plan.start_epoch:
            self.averages.update(module)
        if self.plan.takes_step(epoch, steps):
            self._add(module, f"step={steps}")

    def after_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of an epoch: take a candidate where one is due."""
        if self.plan.takes_epoch_end(trainer.current_epoch):
            self._add(module, f"epoch={trainer.current_epoch}")

    def _add(self, module: LightningModule, name: str) -> None:
        """Keep the weights under a name, unless it is there (a resumed run comes by twice)."""
        if name not in self.names:
            self.store.add(module, name)

    def complete(self, module: LightningModule) -> None:
        """At the switch: the running averages become candidates."""
        for i, decay in enumerate(self.averages.decays if self.averages.updates else ()):
            self.store.give(module, average_name(decay), self.averages.weights(i))
        self.averages.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the candidates."""
        state = self.store.state_dict()
        if self.averages.updates:
            state["averages"] = self.averages.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, complete: bool) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
            complete: Whether the phase has begun: it is spanned by all that it began with.
        """
        if complete:
            self.store.max_candidates = None
        self.store.load_state_dict(dict(state))
        averages = state.get("averages")
        if averages is not None and not complete:
            self.averages.load_state_dict(averages)


def _keeps_older_checkpoints(trainer: Trainer) -> bool:
    """Whether a checkpoint callback keeps others than the newest checkpoint."""
    return any(
        getattr(callback, "monitor", None) is not None
        or getattr(callback, "save_top_k", -1) not in (0, 1)
        for callback in trainer.checkpoint_callbacks
    )
