"""Everything that becomes a candidate: snapshots, running averages, files; and when."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.candidates import (
    Averages,
    Store,
    check_form,
    find_files,
    persistent_buffers,
    read_candidate_from,
    unique_names,
)
from lightning_twa.checkpoint import warn_of_averages
from lightning_twa.config import Settings
from lightning_twa.machine import in_common
from lightning_twa.phases.by_steps import check_placed
from lightning_twa.phases.checks import check_data, check_trainer
from lightning_twa.phases.room import check_directories, check_memory
from lightning_twa.phases.schedule import CollectPlan
from lightning_twa.phases.timed import TimedLength
from lightning_twa.subspace import own_part
from lightning_twa.trainer import (
    at_epoch_start,
    batches_in_all,
    batches_seen,
    keeps_older_checkpoints,
    shards_parameters,
    step_was_taken,
)

__all__ = ["Collector", "file_candidate_names"]

OWN_NAME = re.compile(
    r"(epoch|step)=[0-9]+|(ema|power|last)\(.*\)|mean"
)  # of candidates of this run


class Collector:
    """The candidates of one run. Every rank goes through the same moments.

    Args:
        settings: The arguments of the callback.

    Attributes:
        store: Where candidates wait.
        root: Where files of candidates go.
        cycle: Index of the part of the run, of ``cycles``, that is trained now.
        plans: The schedule of each part.
        epoch_began: So many batches of the run were before the epoch that is under way.
        followed: Optimizer steps whose weights have been looked at.
        timed: How many there will be, where time ends the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store()
        self.averages = Averages(settings.collect, settings.power_averages)
        self.cycle = 0
        self.root = Path()
        self.plans: list[CollectPlan] = []
        self._files: list[Path] = []
        self._names: list[str] = []  # of the candidates in them
        self.epoch_began = 0  # so many batches of the run were before it
        self.followed = 0  # optimizer steps whose weights have been looked at
        self.timed = TimedLength()

    @property
    def plan(self) -> CollectPlan:
        """The resolved schedule of this cycle."""
        assert self.plans, "resolve() comes before every training hook"
        return self.plans[self.cycle]

    @property
    def count(self) -> int:
        """Number of candidates, if the phase began now."""
        names = self.store.names
        return len(names) + sum(name not in names for name in self.averages.names)

    def count_after(self, epoch: int) -> int:
        """Number of candidates at the end of an epoch that is not over yet."""
        due = self.plan.takes_epoch_end(epoch) and f"epoch={epoch}" not in self.store.names
        return self.count + due

    def resolve(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the settings, resolve the schedule, find files, and make room for candidates, of
        which a run that goes on has some; see :mod:`lightning_twa.phases.checks`.
        """
        collect, self.timed = self.settings.collect, TimedLength()
        with in_common(ValueError):
            self._files = [] if collect.checkpoints is None else find_files(collect.checkpoints)
            warn_of_averages(self._files)
        self.plans = check_trainer(self.settings, trainer, module, len(self._files))
        self._names = file_candidate_names(self._files, soup=self.plans[0].start_epoch == 0)
        if len(self.store) > 0:
            return
        storage = self.settings.storage
        root = Path(storage.dirpath or Path(trainer.default_root_dir, "twa_candidates"))
        self.root = root.absolute()
        check_directories(self.settings, trainer, self.root)
        self.store = Store(
            storage,
            self.plans[0].max_candidates,
            evenly=self.plans[0].evenly,
            root=self.root,
            processes_on_host=trainer.num_devices,
            shards=shards_parameters(trainer),
            keep_named=keeps_older_checkpoints(trainer),
            device=trainer.strategy.root_device,
        )

    def note_epoch(self, trainer: Trainer, *, at_start: bool) -> None:
        """Note where the batches of the epoch begin."""
        self.epoch_began = batches_in_all(trainer) - (0 if at_start else batches_seen(trainer))

    def batches_of_epoch(self, trainer: Trainer) -> int:
        """Batches of the epoch that is ending."""
        return batches_in_all(trainer) - self.epoch_began or batches_seen(trainer)

    def check_length(self, trainer: Trainer, loader: Any, *, anew: bool = False) -> None:
        """See :func:`lightning_twa.phases.checks.check_data` and
        :func:`lightning_twa.phases.room.check_memory`.

        Args:
            trainer: The Trainer.
            loader: Of the phase.
            anew: Whether the candidates that are there do not count.
        """
        check_placed(self.plan, self.settings)
        given = len(self._files if anew else self.store.given_names)
        plans, window = self.plans[self.cycle :], 0 if anew else len(self.store) - given
        most = check_data(self.settings, plans, trainer, loader, window, given)
        if most is not None and not self.settings.start_on_early_stopping:  # fewer may be enough
            others = given + self.settings.num_averages
            check_memory(self.settings, trainer, trainer.lightning_module, most, others)

    def begin_anew(self, trainer: Trainer) -> None:
        """Forget the candidates, and collect anew."""
        self.followed = trainer.global_step
        self.store.clear()
        self.store.max_candidates = self.plan.max_candidates  # a resumed phase had none
        self.averages.clear()

    def catch_up(self, trainer: Trainer, module: LightningModule, *, anew: bool = False) -> None:
        """At the start of training: take the candidate that a resumed run would miss, and those in
        files.

        A checkpoint that was written after the last batch of an epoch resumes behind that epoch's
        end.

        Raises:
            ValueError: Naming a file that does not hold weights of this module.
        """
        self.followed = trainer.global_step
        if at_epoch_start(trainer) and not anew:
            self.take_epoch_end(module, trainer.current_epoch - 1)
        for path, name in zip(self._files, self._names, strict=True):
            if not {name, path.stem} & set(self.store.given_names):
                parameters = dict(module.named_parameters())
                expected = {**parameters, **persistent_buffers(module)}
                with in_common(ValueError):
                    read = read_candidate_from(path, expected, parameters)
                own = {key: own_part(t, parameters[key]) for key, t in read.parameters.items()}
                self.store.give(module, name, own, read.buffers)

    def follow_step(self, trainer: Trainer, module: LightningModule) -> bool:
        """After an optimizer step, once: update running averages; take a candidate where one is due
        by steps. A checkpoint may be saved before the callback's own hook comes.

        Returns:
            Whether there was a step.
        """
        epoch, steps = trainer.current_epoch, trainer.global_step
        if steps == self.followed or not step_was_taken(trainer):
            return False
        before, self.followed = self.followed, steps
        self.store.pending.arrive(after_steps=True)
        self.averages.follow(module, in_window=self.plan.covers(epoch, steps))
        if self.plan.takes_step(epoch, steps, before):
            self._take(module, f"step={steps}", f"after step {steps}, in epoch {epoch}")
        return True

    def take_epoch_end(self, module: LightningModule, epoch: int) -> None:
        """Take the weights at the end of an epoch where they are due."""
        if self.plan.takes_epoch_end(epoch, self.followed):
            self._take(module, f"epoch={epoch}", f"at the end of epoch {epoch}")

    def _take(self, module: LightningModule, name: str, moment: str) -> None:
        """Keep the weights, or with ``dense`` a mean, under a name, unless it is there (a resumed
        run comes by twice).
        """
        mean = self.averages.since_newest()
        if name not in self.store.names:
            self.check_form(module, moment)
            self.store.add(module, name, mean)

    def check_form(self, module: LightningModule, moment: str) -> None:
        """Check that the model has the form of the newest candidate.

        Raises:
            ValueError: Naming the parameter that has changed, and the moment.
        """
        with in_common(ValueError):
            for newest in [*self.store][-1:]:
                check_form(module, newest, moment)

    def add_averages(self, module: LightningModule, step: int) -> None:
        """At the switch: averages over steps become candidates.

        Args:
            module: The module.
            step: Optimizer steps of the run.
        """
        self.averages.give(self.store, module, step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the candidates."""
        state = self.store.state_dict()
        return state if self.store.shards else {**state, **self.averages.state_dict()}

    def add_sharded_averages(self, state: dict[str, Any]) -> None:
        """Write averages of sharded parameters, and name them in what a checkpoint is about to
        hold; every process calls it.

        Args:
            state: From :meth:`state_dict`; changed in place.
        """
        if self.store.shards:
            state.update(self.averages.park(self.store))

    def load_state_dict(
        self, state: Mapping[str, Any], *, complete: bool, verify: bool = True
    ) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
            complete: Whether the phase has begun: it is spanned by all that it began with.
            verify: See :meth:`Store.load_state_dict`.
        """
        if complete:
            self.store.max_candidates = None
        self.store.load_state_dict(dict(state), verify=verify)
        if not complete:
            self.averages.load(self.store, state)


def file_candidate_names(files: Sequence[Path], *, soup: bool) -> list[str]:
    """Names for candidates from files, which no candidate that a run takes itself can have: files
    of another run are called as its candidates are, and get the name of their directory too.

    Args:
        files: The files.
        soup: Whether the run takes no candidates itself.
    """
    names = [name.replace("/", "-") for name in unique_names(files)]
    if soup:
        return names
    parents = [path.absolute().parent.name for path in files]
    return [
        f"{parent}-{name}" if OWN_NAME.fullmatch(name) else name
        for name, parent in zip(names, parents, strict=True)
    ]
