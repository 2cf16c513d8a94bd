"""The text a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_twa.candidates import averaged_names
from lightning_twa.config import DATA, Settings
from lightning_twa.machine import say, warn
from lightning_twa.phases.candidate_groups import CandidateGroups
from lightning_twa.results import effective_candidates
from lightning_twa.subspace import SubspaceOptimizer
from lightning_twa.words import count

__all__ = [
    "finish_report",
    "groups_report",
    "log_count",
    "switch_report",
    "tell_what_begins",
    "tell_what_stays",
    "uniform_report",
]

PRESSED = 0.8  # of the budget used in one direction: the optimum is probably further away


def log_count(module: LightningModule, names: list[str]) -> None:
    """At the end of an epoch: the number of candidates, for loggers and progress bars."""
    module.log(  # the same on every rank; without sync_dist Lightning warns
        "twa/num_candidates",
        float(len(names)),
        on_step=False,
        on_epoch=True,
        batch_size=1,
        sync_dist=True,
        prog_bar=True,
    )


def switch_report(
    optimizer: SubspaceOptimizer, names: list[str], data: str, started: Mapping[str, Any]
) -> str:
    """What the phase starts with, in one line.

    Args:
        optimizer: The phase's optimizer.
        names: Names of the candidates.
        data: What the coefficients are trained on, in words.
        started: When the phase started; see :class:`~lightning_twa.phases.optimize.Optimization`.
    """
    subspace, config = optimizer.subspace, optimizer.config
    steps = optimizer.total_steps
    length = "" if steps is None else f" for {count(steps, 'optimizer step')}"
    budget = f"lr {config.lr:g}" if config.lr is not None else f"radius {optimizer.radius:g}"
    blocks = count(subspace.num_blocks, "block")
    stored = subspace.stored
    kept = f"{count(subspace.config.bits, 'bit')}, relative error {stored.error:.2g}, {stored.path}"
    if subspace.config.bits == 32:
        kept = "full precision"
    size = f"{subspace.nbytes / 2**20:.1f} MiB on {subspace.center.device}"
    directions = count(subspace.num_directions, "direction")
    begin = f"epoch {started['epoch']}"
    if started.get("steps_in_epoch", 0):
        begin = f"optimizer step {started['step']} (in {begin})"
    return (
        f"TWA: from {begin} only averaging coefficients are trained{length}, on {data}. "
        f"{len(names)} candidates ({names[0]} .. {names[-1]}), "
        f"{directions} ({subspace.config.basis}; {kept}) of {subspace.layout.numel:,} parameters "
        f"in "
        f"{blocks}, {size}; {config.name}, {budget}."
    )


class Begun(Protocol):
    """A phase that begins; see :class:`~lightning_twa.phases.optimize.Optimization`."""

    settings: Settings
    optimizer: SubspaceOptimizer | None
    groups: CandidateGroups | None
    choice: Any
    started: dict[str, Any]


def tell_what_begins(
    phase: Begun, module: LightningModule, names: list[str], chosen: tuple[str, str] | None
) -> None:
    """Say what a phase begins with.

    Args:
        phase: The phase.
        module: The model.
        names: Names of the candidates.
        chosen: The average that it starts from, and what held-out data say of it, where these
            were asked.
    """
    assert phase.optimizer is not None
    if phase.choice.share.text is not None:
        say(phase.choice.share.text)
    data = phase.settings.data
    say(switch_report(phase.optimizer, names, DATA[data], phase.started))
    tell_what_stays(phase.settings, module)
    if chosen is not None:
        say(f"TWA: it starts from {chosen[0]!r}; on held-out data {chosen[1]}.")
    if phase.groups is not None:
        say(groups_report(phase.groups))
    if data == "val":
        warn(
            "TWACallback(data='val') trains the averaging coefficients on the validation data: "
            "from here on validation metrics are not held out. Judge the result on test data."
        )


def tell_what_stays(settings: Settings, module: LightningModule) -> None:
    """Say how many parameters are not averaged, where the user has chosen."""
    averaged = averaged_names(module, settings.collect)
    trained = [(n, p.numel()) for n, p in module.named_parameters() if p.requires_grad]
    stay = [(name, size) for name, size in trained if averaged is not None and name not in averaged]
    if stay:
        shown = ", ".join(name for name, _ in stay[:3]) + (", ..." if len(stay) > 3 else "")
        say(
            f"TWA: {len(stay)} of {len(trained)} trained parameter tensors "
            f"({sum(size for _, size in stay):,} of {sum(size for _, size in trained):,} numbers) "
            f"are not averaged and keep their last weights (CollectConfig.include, exclude): "
            f"{shown}."
        )


def groups_report(groups: CandidateGroups) -> str:
    """How the candidates are divided, in one line."""
    return (
        f"TWA: the candidates are optimized in {groups.count} groups, one after another; the first "
        f"has {len(groups.members)} candidates and {count(groups.steps, 'optimizer step')}."
    )


def finish_report(
    optimizer: SubspaceOptimizer,
    averaging_weights: Tensor,
    steps: int,
    planned: int | None,
    skipped: int,
    batchnorm_batches: int | None,
    losses: str,
    seconds: float,
    ends_best: bool,
) -> list[str]:
    """What the phase did, in one line, and further lines where the user may want to act.

    Args:
        optimizer: The phase's optimizer, of the last group of candidates where there are groups.
        averaging_weights: ``(n, B)`` what was learned.
        steps: Optimizer steps of the whole phase.
        planned: How many there were to be; ``None`` where nothing limited them.
        skipped: Steps of it that were none, because the gradient was not finite.
        batchnorm_batches: Batches that BatchNorm statistics were re-estimated over; ``None`` if
            there were none to re-estimate.
        losses: What is known of them, in a sentence, or nothing.
        seconds: The phase took, re-estimation included; since it was resumed if it was.
        ends_best: Whether held-out data favour the last point of the path.
    """
    unit = " standard deviations" if optimizer.subspace.config.basis == "pca" else ""
    origin = "the uniform average" if optimizer.subspace.starts_at_mean else "their start"
    effective, n = effective_candidates(averaging_weights), averaging_weights.shape[0]
    how = f"finished after {count(steps, 'optimizer step')}"
    if planned is not None and steps + skipped < planned:
        how = f"cut short after {steps + skipped} of {count(planned, 'optimizer step')}"
    line = (
        f"TWA: phase {how} in {seconds:.1f} s; "
        f"coefficients are {optimizer.coefficient_norm:.2f}{unit} from {origin}, "
        f"effective number of candidates {effective:.1f} of {n}."
    )
    if losses:
        line += f" {losses}"
    if batchnorm_batches is not None:
        line += (
            f" BatchNorm statistics re-estimated over {count(batchnorm_batches, 'training batch')}."
        )
    lines = [line]
    if skipped:
        were = "was" if skipped == 1 else "were"
        lines.append(
            f"TWA: {count(skipped, 'step')} {were} skipped because the gradient was not finite."
        )
    if ends_best and optimizer.config.lr is None:
        reach = float(optimizer.coefficients.norm(dim=0).max())
        if reach > PRESSED * optimizer.radius:
            lines.append(
                f"TWA: the coefficients pressed against their budget: they ended {reach:.2f} from "
                f"{origin}, of SolverConfig.radius={optimizer.radius:g}, and held-out data favour "
                f"the end of the path. A better average may lie further out: try a larger radius, "
                f"or later candidates."
            )
    return lines


def uniform_report(names: list[str], batchnorm_batches: int | None) -> str:
    """What a run without a phase ends with, in one line.

    Args:
        names: Names of the candidates.
        batchnorm_batches: See :func:`finish_report`.
    """
    named = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
    line = f"TWA: the uniform average of {count(len(names), 'candidate')} ({named})."
    if batchnorm_batches is not None:
        line += (
            f" BatchNorm statistics re-estimated over {count(batchnorm_batches, 'training batch')}."
        )
    return line
