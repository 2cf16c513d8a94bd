"""Whether there will be enough candidates."""

from __future__ import annotations

from lightning_twa.phases.schedule import CollectPlan

__all__ = ["check_enough_candidates", "check_something"]


def check_something(plan: CollectPlan, expected: int | None, averages: int) -> None:
    """Without a phase, one candidate is enough.

    Args:
        plan: The schedule, for the message.
        expected: Number of snapshots there will be; ``None`` when it cannot be known.
        averages: Number of running averages.

    Raises:
        ValueError: When there will be none.
    """
    if expected == 0 and averages == 0:
        raise ValueError(
            f"There will be nothing to average: collecting {plan.describe()} gives no candidate. "
            f"Start collecting earlier (CollectConfig.start), or collect more often "
            f"(every_n_epochs, every_n_train_steps)."
        )


def check_enough_candidates(
    plan: CollectPlan, expected: int | None, others: int = 0, mask_size: int | None = None
) -> None:
    """Two points span the smallest subspace; a mask leaves at least one candidate out.

    Args:
        plan: The schedule, for the message.
        expected: Number of snapshots there will be; ``None`` when it cannot be known.
        others: Number of running averages and files.
        mask_size: Candidates that a mask keeps.

    Raises:
        ValueError: When too few candidates are to be expected.
    """
    limit = plan.max_candidates
    if expected is not None and limit is not None:
        expected = min(expected, limit)
    most = limit if expected is None else expected
    if mask_size is not None and most is not None and most + others <= mask_size:
        raise ValueError(
            f"SubspaceConfig.mask_size={mask_size} needs more than {mask_size} candidates, but "
            f"there will be {most + others}. Lower mask_size, or have more candidates."
        )
    if expected is None or expected + others >= 2:
        return
    if plan.start_epoch == 0 and plan.start_step is None:
        raise ValueError(
            f"TWA needs at least two candidates, but CollectConfig.checkpoints names {others} "
            f"file(s), and start_epoch=0 leaves no epoch to collect in. Name more files."
        )
    also = f", and there are {others} from files and running averages" if others else ""
    later = "raise start_epoch" if plan.start_step is None else "begin the phase later"
    raise ValueError(
        f"TWA needs at least two candidates, but collecting {plan.describe()} gives {expected} "
        f"before {plan.describe_start()}{also}. Start collecting earlier (CollectConfig.start), "
        f"collect more often (every_n_epochs, every_n_train_steps), or {later}."
    )
