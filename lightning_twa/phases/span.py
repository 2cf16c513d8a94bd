"""What a phase spans and is trained with, decided where it is entered, and the subspace for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import (
    Store,
    averaged_names,
    check_complete,
    check_files,
    copy_into,
    depends_on_values,
    mean_buffers,
    put_weighted,
    varying,
    weighted,
)
from lightning_twa.config import CollectConfig, Settings, SolverConfig
from lightning_twa.machine import all_ranks, in_common, warn, world_size
from lightning_twa.phases.candidate_groups import CandidateGroups
from lightning_twa.phases.ranks import Sharing, decide
from lightning_twa.subspace import (
    Subspace,
    SubspaceOptimizer,
    build_subspace,
    kept_by_mask,
    local_part,
    to_shards,
)
from lightning_twa.trainer import max_epochs, show_progress, steps_for, steps_per_epoch

__all__ = [
    "Choice",
    "build",
    "choose",
    "prepare_model",
    "put_exactly",
    "steps_of_phase",
    "with_radius",
]


@dataclass(frozen=True)
class Choice:
    """What a phase is trained with.

    Args:
        share: How the processes share the work.
        groups: Groups of candidates; ``None`` where all span one subspace.
        solver: With the radius of a soup.
        total_steps: Optimizer steps of the whole phase; ``None`` when unknown.
        spanned: Names of the parameters that the subspace spans.
        doubtful: Names of those that are frozen, though the user's optimizer has them.
    """

    share: Sharing
    groups: CandidateGroups | None
    solver: SolverConfig
    total_steps: int | None
    spanned: set[str]
    doubtful: list[str]


def choose(
    settings: Settings,
    trainer: Trainer,
    module: LightningModule,
    store: Store,
    started: Mapping[str, Any],
    end: int | None,
) -> Choice:
    """Decide what the phase is trained with, the same on every rank.

    Args:
        settings: The arguments of the callback.
        trainer: At the switch, or where a run goes on within the phase; with the user's optimizer.
        module: The model.
        store: The candidates.
        started: When the phase began; see :class:`~lightning_twa.phases.optimize.Optimization`.
        end: Epoch at which the phase ends; ``None`` where only the Trainer ends it.

    Raises:
        ValueError: Naming the candidate and the tensor that it lacks; or when a mask would keep all
            of them.
        CandidateFileError: Naming a damaged file, where values are compared.
    """
    to_shards(module)
    with in_common():
        check_complete(store.forms, module)
        if settings.subspace.parametrization == "mask":
            kept_by_mask(settings.subspace, len(store))
    named = dict(module.named_parameters())
    held_by_user = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    optimized = {name: p for name, p in named.items() if id(p) in held_by_user}
    trained = {n for n, p in optimized.items() if p.requires_grad}
    here = trainer.strategy.root_device
    if not all_ranks(not depends_on_values(store.forms, trained), here):
        check_files(store)
    spanned = varying(store.forms, also=trained)
    averaged = averaged_names(module, settings.collect)
    spanned = spanned if averaged is None else spanned & averaged
    doubtful = [n for n, p in optimized.items() if not p.requires_grad and n in spanned]
    size = settings.subspace.group_size
    held = len(store) if size is None else min(size, len(store))
    parameters = {name: p for name, p in named.items() if name in spanned}
    share = decide(settings, trainer, module, parameters, held)
    total_steps = steps_of_phase(settings, trainer, started, end)
    groups = None
    if size is not None and size < len(store):
        groups = _groups(len(store), share.columns.whole.num_blocks, size, total_steps)
    solver = settings.solver
    if started["step"] == 0 and solver.lr is None and solver.radius is None:
        solver = replace(solver, radius=2.0 * held**0.5)  # a soup
    return Choice(share, groups, solver, total_steps, spanned, doubtful)


def _groups(n: int, num_blocks: int, size: int, total_steps: int | None) -> CandidateGroups:
    assert total_steps is not None, "check_data() has seen to it"
    groups = CandidateGroups(n, num_blocks, size, total_steps)
    left_out = groups.count - groups.total_steps
    if left_out > 0:
        warn(
            f"group_size={size} makes {groups.count} groups, but the phase has "
            f"{total_steps} optimizer steps: the last {left_out} are left out. Use a "
            f"larger group_size, or a longer phase."
        )
    return groups


def steps_of_phase(
    settings: Settings, trainer: Trainer, started: Mapping[str, Any], end: int | None
) -> int | None:
    """Optimizer steps of the whole phase, the same number when the phase is resumed; ``None`` when
    nothing limits it.
    """
    per_epoch = steps_per_epoch(trainer)
    if per_epoch is None and settings.data == "train":
        per_epoch = steps_for(trainer, started["epoch_batches"])
    limits = [started["stops_at_step"] - started["step"]] if "stops_at_step" in started else []
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps - started["step"])
    end = started.get("stops_at", max_epochs(trainer) if end is None else end)
    if end is not None and per_epoch is not None:
        limits.append((end - started["epoch"]) * per_epoch - started.get("steps_in_epoch", 0))
    return max(min(limits), 1) if limits else None


def with_radius(solver: SolverConfig, *, chosen: bool) -> SolverConfig:
    """The solver with the radius that suits a start that was chosen."""
    given = solver.lr is not None or solver.radius is not None
    return solver if given or not chosen else replace(solver, radius=1.0)


def prepare_model(
    module: LightningModule, store: Store, spanned: set[str], collect: CollectConfig, *, soup: bool
) -> None:
    """Write into a model what the subspace does not span: buffers, averaged, and parameters that
    are the same in all candidates, since those from files may be others than the module's, which
    nobody will train. What is not to be averaged stays as it is; of a soup it is the newest file's.

    Args:
        module: The model.
        store: The candidates.
        spanned: Names of the parameters that the subspace spans.
        collect: Which are averaged.
        soup: Whether nothing was trained before.
    """
    averaged = averaged_names(module, collect)
    with in_common():
        *_, newest = store
        if averaged is not None and soup:
            copy_into(module, {k: v for k, v in newest.tensors.items() if k not in averaged})
        copy_into(module, mean_buffers(store, module, averaged))
        same = {k: v for k, v in newest.parameters.items() if k not in spanned}
        copy_into(module, {k: v for k, v in same.items() if averaged is None or k in averaged})


def put_exactly(
    module: LightningModule, store: Store, optimizer: SubspaceOptimizer, weights: Tensor
) -> bool:
    """Write an average of the candidates themselves, without the rounding of the basis.

    Args:
        module: The model.
        store: The candidates.
        optimizer: Of the phase; where it fails the model gets what its coefficients say.
        weights: ``(n, B)``.

    Returns:
        Whether it could be done; a warning says why not.
    """
    try:
        check_files(store)
        with in_common():
            put_weighted(module, store, optimizer.subspace.layout.specs, weights)
    except Exception as error:  # a file that has gone meanwhile, say
        optimizer.write_parameters()
        warn(
            f"The average that was learned could not be put together from the candidates "
            f"({type(error).__name__}: {error}). The model has what the phase ended with, of "
            f"groups of candidates its last group."
        )
        return False
    return True


def build(
    settings: Settings,
    trainer: Trainer,
    module: LightningModule,
    store: Store,
    share: Sharing,
    groups: CandidateGroups | None,
    origin: Tensor | None = None,
    mixing: Tensor | None = None,
) -> Subspace:
    """The subspace of all candidates or of the current group, with the directions of a checkpoint.

    Args:
        settings: The arguments of the callback.
        trainer: For its progress bar.
        module: Left at the start of the current group, where there are groups.
        store: The candidates.
        share: What is held here.
        groups: Groups of candidates.
        origin: ``(n, B)`` averaging weights of where the phase starts, if not the uniform average
            of all candidates.
        mixing: ``(B, k, n)`` of a phase that goes on.

    Raises:
        CandidateFileError: Naming a damaged file, where that is looked at only here.
    """
    check_files(store)
    members, start = list(store), None
    if groups is not None:
        with in_common():
            put_weighted(module, store, share.columns.whole.specs, groups.start)
        members = [members[i] for i in groups.members]
        start = {name: local_part(p) for name, p in module.named_parameters()}
    elif origin is not None:
        with in_common():
            start = weighted(store, share.columns.whole.specs, origin)
    passes = 2 if mixing is None else 1
    total = passes * share.columns.local.numel
    if share.columns.everywhere:
        total //= world_size()  # each process builds a part for all
    with show_progress(trainer, "building the subspace", " columns", total) as tick:
        return build_subspace(
            (candidate.parameters for candidate in members),
            settings.subspace,
            device=trainer.strategy.root_device,
            mixing=mixing,
            columns=share.columns,
            start=start,
            tick=tick,
        )
