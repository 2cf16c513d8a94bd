"""What can be wrong with a run, said before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_twa.candidates import averaged_names, check_selection
from lightning_twa.config import Settings
from lightning_twa.machine import warn
from lightning_twa.phases.by_steps import begins_by_steps, check_limits, plan_by_steps
from lightning_twa.phases.enough import check_enough_candidates, check_something
from lightning_twa.phases.plan import cycle_bounds, resolve_plans
from lightning_twa.phases.schedule import CollectPlan
from lightning_twa.trainer import (
    accumulates_gradients,
    callback_names,
    count_of_callbacks,
    has_length,
    has_time_limit,
    has_validation_data,
    max_epochs,
    package_of,
    scales_loss,
    shards_parameters,
    steps_per_epoch,
    strategy_names,
)
from lightning_twa.words import count

__all__ = [
    "check_data",
    "check_optimizers",
    "check_package",
    "check_parameters",
    "check_trainer",
]

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
WHY_NOT = {
    "DeepSpeedStrategy": "its engine steps an optimizer of its own",
    "FSDPStrategy": "it flattens parameters; FSDP2 in ModelParallelStrategy does not",
}
AVERAGING_CALLBACKS = {"WeightAveraging", "StochasticWeightAveraging"}  # and what derives from them
UNSUPPORTED = ("XLAStrategy", "SingleDeviceXLAStrategy")  # though derived from those


def check_trainer(
    settings: Settings, trainer: Trainer, module: LightningModule, files: int = 0
) -> list[CollectPlan]:
    """What can be said before any data is there.

    Args:
        settings: The arguments of the callback.
        trainer: The Trainer.
        module: The module.
        files: Number of candidates from files.

    Returns:
        The schedule of each cycle, resolved for this Trainer.

    Raises:
        ValueError: Naming the setting that does not fit this Trainer, and what to do instead.
    """
    _check_strategy(settings, trainer)
    if not (module.automatic_optimization or settings.uniform):
        raise ValueError(
            "TWACallback needs automatic optimization: with automatic_optimization=False, and with "
            "several optimizers, the module steps its own optimizers and the phase could not "
            "replace them. Use SolverConfig(name='uniform'), which has no phase; or average the "
            "weights in your own loop with build_subspace() and SubspaceOptimizer."
        )
    several = count_of_callbacks(trainer, "TWAHooks")
    if several > 1:
        raise ValueError(
            f"The Trainer has {several} TWACallbacks, and each would put an average of its own "
            f"into the model. Keep one: averages of other widths are further candidates of it "
            f"(CollectConfig.power_averages, ema_decays), several phases are cycles, and other "
            f"settings are compared in runs of their own, with a copy of the callback in each."
        )
    for name in callback_names(trainer) & AVERAGING_CALLBACKS:
        raise ValueError(
            f"TWACallback and {name} cannot be used in one run: both put an average of their "
            f"own into the model at its end. Compare them in separate runs."
        )
    if "ModelPruning" in callback_names(trainer):
        raise ValueError(
            "TWACallback and ModelPruning cannot be used in one run: pruning replaces parameters "
            "by others with masks, so candidates from before and after it do not match. Prune in "
            "a run before, or after."
        )
    if settings.data == "val" and not has_validation_data(trainer):
        raise ValueError(
            "TWACallback(data='val') trains the coefficients on the validation data, but there is "
            "none. Pass val_dataloaders to fit, define val_dataloader(), or use data='train'."
        )
    _check_closure(settings, trainer)
    _check_devices(settings)
    epochs = max_epochs(trainer)
    if settings.start_on_early_stopping and "EarlyStopping" not in callback_names(trainer):
        raise ValueError(
            "TWACallback(start_on_early_stopping=True) needs an EarlyStopping callback, but the "
            "Trainer has none. Add one, or leave the argument out."
        )
    ends = trainer.max_steps != -1 or has_time_limit(trainer)
    check_limits(settings, epochs, ends=ends)
    if settings.length_is_given and "GradientAccumulationScheduler" in callback_names(trainer):
        raise ValueError(
            f"A phase of the last steps ({settings.length_in_words}) does not go with "
            f"GradientAccumulationScheduler: epochs have different numbers of optimizer steps. "
            f"Pass start_epoch instead."
        )
    if begins_by_steps(settings, epochs, ends=ends):
        bounds = cycle_bounds(settings.cycles, epochs)
        return [plan_by_steps(settings, a, b) for a, b in bounds]
    assert settings.start_epoch is not None
    return resolve_plans(
        settings.start_epoch,
        settings.collect,
        epochs,
        files,
        settings.uniform,
        settings.cycles,
        settings.start_on_early_stopping,
        trainer.max_steps,
    )


def _check_devices(settings: Settings) -> None:
    """A device that is not there must not show after hours of collecting."""
    devices = {
        "SubspaceConfig.device": settings.subspace.device,
        "CollectConfig.ema_device": settings.collect.ema_device,
    }
    for name, device in devices.items():
        try:
            torch.empty(1, device=device).tolist()  # "meta" has no values
        except Exception as error:  # torch raises many types
            raise ValueError(
                f"{name}={device!r} cannot be used on this machine ({error}). Name a device that "
                f"is there, or leave it out: the model's own."
            ) from error


def _check_closure(settings: Settings, trainer: Trainer) -> None:
    """Where the loss is evaluated at other weights than the model's, within the optimizer's step,
    all of it must happen there.
    """
    if settings.solver.sam_rho > 0:
        what = f"SolverConfig.sam_rho={settings.solver.sam_rho}"
    elif settings.subspace.parametrization == "mask":
        what = "SubspaceConfig.parametrization='mask'"
    else:
        return
    if accumulates_gradients(trainer):
        raise ValueError(
            f"{what} does not go with gradient accumulation: all but the last of the accumulated "
            f"batches would see other weights. Use accumulate_grad_batches=1."
        )
    if scales_loss(trainer):
        raise ValueError(
            f"{what} does not go with precision='16-mixed', whose loss scaler evaluates the loss "
            f"outside of the optimizer's step. Use 'bf16-mixed' or '32-true'."
        )


def _check_strategy(settings: Settings, trainer: Trainer) -> None:
    names = strategy_names(trainer)
    if not names & set(STRATEGIES) or names & set(UNSUPPORTED):
        reasons = [f": {reason}" for name, reason in WHY_NOT.items() if name in names]
        raise ValueError(
            f"TWACallback does not support {type(trainer.strategy).__name__}"
            f"{reasons[0] if reasons else ''}. Use one device, strategy='ddp', or FSDP2 "
            f"(supported: {', '.join(STRATEGIES)})."
        )
    if not shards_parameters(trainer):
        return
    if settings.distribute == "replicate":
        raise ValueError(
            f"distribute='replicate' does not go with {type(trainer.strategy).__name__}, which "
            f"leaves each process a part of the parameters. Use 'auto' or 'shard'."
        )
    if settings.continue_from == "raw":
        raise ValueError(
            f"continue_from='raw' does not go with {type(trainer.strategy).__name__}: a checkpoint "
            f"holds the callback state of one process, and with it a part of the weights. Use "
            f"'average', or keep a checkpoint of before the phase."
        )
    if settings.storage.kind == "memory":
        raise ValueError(
            f"StorageConfig(kind='memory') does not go with {type(trainer.strategy).__name__}: a "
            f"checkpoint holds the callback state of one process, and with it a part of each "
            f"candidate. Use 'auto' or 'disk'."
        )


def check_package(callback: Callback, trainer: Trainer) -> None:
    """A callback of one package of Lightning does not fit a Trainer of the other.

    Raises:
        ValueError: Naming both, and what to import.
    """
    mine, theirs = package_of(callback), package_of(trainer)
    if mine == theirs:
        return
    module = "lightning_twa" if theirs == "lightning.pytorch" else "lightning_twa.pytorch_lightning"
    raise ValueError(
        f"This TWACallback is of the package {mine}, but the Trainer is of {theirs}. Use one of "
        f"them throughout: from {module} import TWACallback."
    )


def check_optimizers(settings: Settings, trainer: Trainer) -> None:
    """The phase's optimizer steps in the place of one of the user's; without a phase there may be
    several.

    Raises:
        ValueError: When there is another number of them.
    """
    if settings.uniform and not trainer.lightning_module.automatic_optimization:
        return
    # For configure_optimizers() that returns None Lightning makes an optimizer without groups.
    found = sum(bool(optimizer.param_groups) for optimizer in trainer.optimizers)
    if found != 1:
        raise ValueError(
            f"TWACallback needs exactly one optimizer, but configure_optimizers() gave {found}."
        )


def check_parameters(settings: Settings, module: LightningModule) -> None:
    """What can be said once the parameters are there.

    Raises:
        ValueError: Naming a trainable parameter that cannot be averaged, or a pattern that none
            has.
    """
    check_selection(module, settings.collect)
    averaged = averaged_names(module, settings.collect)
    trained = [
        (name, p)
        for name, p in module.named_parameters()
        if p.requires_grad and (averaged is None or name in averaged)
    ]
    for name, parameter in trained:
        if not parameter.is_floating_point():
            raise ValueError(
                f"TWACallback cannot average {name!r} of dtype {parameter.dtype}, only real "
                f"floating-point parameters. Keep its parts (torch.view_as_real), freeze it, or "
                f"leave it out (CollectConfig.exclude)."
            )
        if parameter.layout != torch.strided:
            raise ValueError(
                f"TWACallback cannot average {name!r}, which is trained, with the layout "
                f"{parameter.layout}. Train a dense one, freeze it, or leave it out "
                f"(CollectConfig.exclude)."
            )


def check_data(
    settings: Settings,
    plans: Sequence[CollectPlan],
    trainer: Trainer,
    loader: Any,
    candidates: int,
    files: int,
) -> int | None:
    """What can be said once the data is there and before training starts.

    Args:
        settings: The arguments of the callback.
        plans: From :func:`check_trainer`, of this cycle and those to come.
        trainer: With its training data set up.
        loader: From :func:`~lightning_twa.phases.phase_data.request_loader`.
        candidates: Number of snapshots a resumed run has already.
        files: Number of candidates from files.

    Returns:
        The number of snapshots that the largest average of the run, which is reached, will have at
        least; ``None`` where that is not known.

    Raises:
        ValueError: When there will be too few candidates, or the schedule's length is unknown.
    """
    per_epoch = steps_per_epoch(trainer)
    epoch, steps = trainer.current_epoch, trainer.global_step
    averages = settings.num_averages
    last = _last_epoch(trainer, per_epoch)
    most: int | None = None
    for plan in plans:
        reached = (
            last is None or (plan.collect_start if settings.uniform else plan.start_epoch) <= last
        )
        if settings.uniform and last is not None:
            plan = replace(plan, start_epoch=min(plan.start_epoch, last + 1))
        ahead = plan.count_ahead(epoch, steps, per_epoch)
        expected = None if ahead is None else ahead + candidates
        if not settings.uniform:
            check_enough_candidates(plan, expected, averages + files, settings.subspace.mask_size)
        elif reached:
            check_something(plan, expected, averages)
        if reached and expected is not None:
            most = max(most or 0, min(expected, plan.max_candidates or expected))
        if plan.end is not None:  # the next cycle starts there, with no candidate
            epoch, steps, candidates = plan.end, plan.end * (per_epoch or 0), 0
    _warn_of_max_steps(settings, plans[0], trainer, last)
    if settings.uniform:
        return most
    _warn_of_rank(settings, most, averages + files)
    solver = settings.solver
    given = plans[0].phase_steps is not None
    known = given or settings.rate_is_constant
    sized = settings.data == "train" or has_length(loader)
    epochs = max_epochs(trainer)
    by_time = epochs is None and plans[0].start_epoch > 0 and has_time_limit(trainer)
    endless = (epochs is None or not sized) and trainer.max_steps == -1 and not by_time
    if settings.cycles > 1 and settings.length_is_given and not sized:
        raise ValueError(
            f"cycles={settings.cycles} does not go with data={settings.data!r} without a length: "
            f"the run would end with the first phase. Give the data a length, or use cycles=1."
        )
    limit = "max_epochs" if sized else "phase_steps"
    remedy = f"{limit} or max_steps" + ("" if sized else " (the data has no length)")
    if endless and not known:
        raise ValueError(
            f"The length of the phase is not known (max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, data={settings.data!r}), but "
            f"schedule={solver.schedule!r} needs it. Set {remedy}, or use "
            f"SolverConfig(schedule='constant', lr=...)."
        )
    if endless and not given and settings.subspace.group_size:
        raise ValueError(
            f"The length of the phase is not known (max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, data={settings.data!r}), but "
            f"SubspaceConfig.group_size={settings.subspace.group_size} shares it out among the "
            f"groups. Set {remedy}, or leave group_size out."
        )
    return most


def _last_epoch(trainer: Trainer, per_epoch: int | None) -> int | None:
    """The epoch in which ``max_steps`` are used up; ``None`` where that is not known."""
    if trainer.max_steps == -1 or not per_epoch:
        return None
    return -(-trainer.max_steps // per_epoch) - 1


def _warn_of_max_steps(
    settings: Settings, plan: CollectPlan, trainer: Trainer, last: int | None
) -> None:
    """Say at the start, and not only at the end, that the phase will not be reached."""
    if last is None:
        return
    if settings.uniform and plan.collect_start > last:
        warn(
            f"There will be nothing to average: max_steps={trainer.max_steps} ends the run in "
            f"epoch {last}, before epoch {plan.collect_start}, where collecting starts. Lower "
            f"CollectConfig.start (or start_epoch) to {last} or less, or raise max_steps."
        )
    if not settings.uniform and plan.start_epoch > last:
        warn(
            f"TWA will not run: max_steps={trainer.max_steps} ends the run in epoch {last}, before "
            f"start_epoch={plan.start_epoch} begins the phase. Lower start_epoch to {last} or "
            f"less, or raise max_steps."
        )


def _warn_of_rank(settings: Settings, snapshots: int | None, others: int) -> None:
    """An option without effect."""
    rank, size = settings.subspace.rank, settings.subspace.group_size
    if rank is None or snapshots is None:
        return
    n = min(snapshots + others, size or snapshots + others)
    if rank >= n:
        warn(
            f"SubspaceConfig.rank={rank} keeps all directions: {count(n, 'candidate')} "
            f"{'in a group ' if size is not None else ''}have {n - 1} at most."
        )
