"""A schedule in optimizer steps: of a run that has no limit in epochs, and of a phase of so many
steps. Where they fall is known once the data is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_twa.config import Settings
from lightning_twa.phases.plan import newest_of, resolve_epoch
from lightning_twa.phases.schedule import NEVER, CollectPlan

__all__ = [
    "Position",
    "begins_by_steps",
    "check_limits",
    "check_placed",
    "length_of",
    "phase_stops",
    "place",
    "plan_by_steps",
]


SPARE = 2  # times as long as its steps in ordinary training: the switch, measuring, slower steps


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is, and what is known of its length.

    Args:
        epoch: That is under way, or begins.
        steps: Optimizer steps taken.
        steps_in_epoch: Those of them in this epoch.
        per_epoch: Optimizer steps of an epoch of training; ``None`` where that is not known.
        max_steps: Of the run; -1 without a limit.
        by_time: Optimizer steps of the run when its time is over, as it looks now; ``None`` without
            a limit in time, or where nothing is known yet.
    """

    epoch: int
    steps: int
    steps_in_epoch: int
    per_epoch: int | None
    max_steps: int
    by_time: int | None = None

    @property
    def last_step(self) -> int | None:
        """The optimizer step that ends a run without a limit in epochs, where that is known."""
        limits = [] if self.max_steps == -1 else [self.max_steps]
        return min(limits if self.by_time is None else [*limits, self.by_time], default=None)


def begins_by_steps(settings: Settings, max_epochs: int | None, *, ends: bool) -> bool:
    """Whether the phase (or, without one, collecting) begins at an optimizer step and not with an
    epoch.

    Args:
        settings: The arguments of the callback.
        max_epochs: Of the run; ``None`` without a limit.
        ends: Whether it has a limit in steps or in time.
    """
    if settings.start_epoch is None:
        return True
    only_steps = max_epochs is None and ends
    start = settings.start_epoch
    if settings.uniform and settings.collect.start is not None:
        start = settings.collect.start
    return isinstance(start, float) and only_steps


def check_limits(settings: Settings, max_epochs: int | None, *, ends: bool) -> None:
    """Check that the phase's steps can be counted from the end of the run; the arguments are those
    of :func:`begins_by_steps`.

    Raises:
        ValueError: When the run has none.
    """
    steps = settings.phase_steps
    if not settings.length_is_given or max_epochs is not None or ends:
        return
    if settings.start_epoch is None or isinstance(steps, float):
        raise ValueError(
            f"The phase ({settings.length_in_words}) is counted from the end of the run, but this "
            f"Trainer has no limit (max_epochs=-1, max_steps=-1). Set Trainer(max_epochs=...), "
            f"max_steps or max_time, or pass start_epoch and phase_steps, an int."
        )


def check_placed(plan: CollectPlan, settings: Settings) -> None:
    """Check that it will be known where the phase falls: of data without a length, behind the first
    epoch.

    Args:
        plan: Placed at the start of training.
        settings: The arguments of the callback.

    Raises:
        ValueError: When it would be known too late.
    """
    waits = plan.start_step is None and settings.length_is_given and plan.start_epoch == NEVER
    if waits and plan.end is not None and plan.end - plan.first < 2:
        raise ValueError(
            f"The phase ({settings.length_in_words}) is counted from the end of the run, "
            f"but the training data has no length, and there is one epoch. Set "
            f"Trainer(max_steps=...)."
        )


def plan_by_steps(settings: Settings, first: int, end: int | None) -> CollectPlan:
    """The schedule before it is known where the steps fall; see :func:`place`.

    Args:
        settings: The arguments of the callback.
        first: The epoch that the part of the run begins with.
        end: The one that ends it; ``None`` without a limit in epochs.
    """
    collect = settings.collect
    start = collect.start if isinstance(collect.start, int) else 0
    if isinstance(collect.start, float) and end is not None:
        start = resolve_epoch("CollectConfig.start", collect.start, end - first)
    return CollectPlan.of(
        collect,
        uniform=settings.uniform,
        collect_start=first + start,
        start_epoch=NEVER,
        end=end,
        first=first,
    )


def place(plan: CollectPlan, settings: Settings, now: Position) -> CollectPlan:
    """The schedule with the steps where they fall, as far as that is known.

    Args:
        plan: From :func:`plan_by_steps`, or placed before.
        settings: The arguments of the callback.
        now: In the part of the run that the plan is of, before its phase.

    Raises:
        ValueError: When the phase would leave nothing to collect in.
    """
    max_epochs = plan.end  # None without a limit, with cycles or without
    last_step = now.last_step
    if not begins_by_steps(settings, max_epochs, ends=True):
        return _with_length(plan, settings, now)
    if settings.uniform:
        start = settings.start_epoch if settings.collect.start is None else settings.collect.start
        assert isinstance(start, float)
        at = None if last_step is None else _round(start * last_step)
        return replace(plan, collect_start_step=at)
    length, left = length_of(plan, now), _left(plan, now)
    if length is None or left is None:
        return plan
    phase = settings.steps_of_phase(length)
    first_step, timed = now.steps + left - length, _ends_by_time(plan, now)
    if timed and phase is not None:  # those of the phase take longer
        length -= min(SPARE * phase, length // 2)
    if settings.start_epoch is not None:
        assert last_step is not None  # what is left is known
        start = _round(settings.start_epoch * last_step)
        rest = last_step - start
        phase = _in_time(rest, plan, now) if phase is None else min(phase, rest)
    else:
        assert phase is not None
        start = first_step + length - phase
    if start <= first_step and timed:  # as it looks now: the first steps may be slow
        start = first_step + max(length // 2, 1)
    if start <= first_step:
        given, remedy = settings.length_in_words, "Give the phase fewer"
        if settings.start_epoch is not None:
            given, remedy = f"start_epoch={settings.start_epoch}", "Raise start_epoch"
        raise ValueError(
            f"{given} leaves no optimizer step to collect candidates in: the run has {length}. "
            f"{remedy}, or raise max_epochs or max_steps."
        )
    placed = replace(plan, start_step=start, phase_steps=phase, start_epoch=NEVER)
    if now.per_epoch is not None:
        ahead = start - now.steps + now.steps_in_epoch
        placed = replace(placed, start_epoch=max(now.epoch + ahead // now.per_epoch, plan.first))
    return _with_window(placed, settings, first_step, length, now)


def phase_stops(
    plan: CollectPlan, settings: Settings, now: Position, *, early: bool, sized: bool
) -> dict[str, int]:
    """Where a run is to end whose phase begins now, if that is not the Trainer's own end: an epoch
    under ``stops_at``, or an optimizer step under ``stops_at_step``.

    Args:
        plan: Placed.
        settings: The arguments of the callback.
        now: Where the run is.
        early: Whether ``EarlyStopping`` begins the phase.
        sized: Whether the phase's data has a length.
    """
    by_steps = plan.start_step is not None and now.steps >= plan.start_step
    by_epochs = plan.start_step is None and now.epoch >= plan.start_epoch
    early = early and not (by_steps or by_epochs)
    if early and plan.start_step is None and plan.end is not None and not settings.length_is_given:
        return {"stops_at": now.epoch + plan.end - plan.start_epoch}
    both = settings.phase_steps is not None and settings.start_epoch is not None
    needed = settings.length_is_given or settings.subspace.group_size is not None
    needed = needed or not settings.rate_is_constant
    both = both or (_ends_by_time(plan, now) and needed)
    unsized = settings.length_is_given and not sized
    if plan.phase_steps is None or not (early or both or unsized):
        return {}
    end = now.steps + plan.phase_steps
    return {"stops_at_step": end if now.max_steps == -1 else min(end, now.max_steps)}


def _with_length(plan: CollectPlan, settings: Settings, now: Position) -> CollectPlan:
    """With the steps of a phase that begins with an epoch, where they are not those to the end."""
    if settings.phase_steps is not None:
        return replace(plan, phase_steps=settings.steps_of_phase(length_of(plan, now)))
    last_step = now.last_step
    if plan.end is None and last_step is not None and now.per_epoch is not None:
        before = plan.start_epoch * now.per_epoch
        return replace(plan, phase_steps=max(_in_time(last_step - before, plan, now), 1))
    return plan


def _ends_by_time(plan: CollectPlan, now: Position) -> bool:
    """Whether time ends this part of the run, as it looks now."""
    return now.by_time is not None and _left(plan, now) == max(now.by_time - now.steps, 0)


def _in_time(steps: int, plan: CollectPlan, now: Position) -> int:
    """Optimizer steps of a phase in the time of so many of ordinary training."""
    return steps * 4 // 5 if _ends_by_time(plan, now) else steps


def _with_window(
    plan: CollectPlan, settings: Settings, first_step: int, length: int, now: Position
) -> CollectPlan:
    """When collecting begins: as given, else halfway, and early enough for two candidates at epoch
    ends.
    """
    collect = settings.collect
    if isinstance(collect.start, int) or (collect.start is not None and plan.end is not None):
        return plan  # in epochs
    if collect.start is not None:
        return replace(plan, collect_start_step=first_step + _round(collect.start * length))
    window = _default_window(plan, settings, first_step)
    if not settings.start_on_early_stopping:
        return window
    most = window.count_ahead(plan.first, first_step, now.per_epoch)
    window = newest_of(window, most) or window
    return replace(window, collect_start=plan.first, collect_start_step=None)


def _default_window(plan: CollectPlan, settings: Settings, first_step: int) -> CollectPlan:
    collect, start_step = settings.collect, plan.start_step
    assert start_step is not None
    if collect.every_n_train_steps is not None or plan.start_epoch == NEVER:
        return replace(plan, collect_start_step=first_step + (start_step - first_step) // 2)
    start, n = plan.start_epoch, collect.every_n_epochs or 1
    halfway = plan.first + (start - plan.first) // 2
    return replace(plan, collect_start=max(min(halfway, start - start % n - 1 - n), plan.first))


def _left(plan: CollectPlan, now: Position) -> int | None:
    """Optimizer steps to the end of the part of the run."""
    several = plan.end is None or plan.end - plan.first > 1
    if plan.end is not None and now.per_epoch is None and several:
        return None  # the next epoch will tell
    limits = [] if now.last_step is None else [now.last_step - now.steps]
    if plan.end is not None and now.per_epoch is not None:
        limits.append((plan.end - now.epoch) * now.per_epoch - now.steps_in_epoch)
    return max(min(limits), 0) if limits else None


def length_of(plan: CollectPlan, now: Position) -> int | None:
    """Optimizer steps of the part of the run; ``None`` where that is not known.

    Args:
        plan: Of that part.
        now: In it.
    """
    left = _left(plan, now)
    if left is None:
        return None
    if now.per_epoch is None or plan.first == 0:
        return now.steps + left
    return (now.epoch - plan.first) * now.per_epoch + now.steps_in_epoch + left


def _round(value: float) -> int:
    """Without the noise of floats; see :func:`~lightning_twa.phases.plan.resolve_epoch`."""
    return int(round(value, 6))
