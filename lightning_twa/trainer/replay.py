"""Forward passes over the training data that leave no trace, for statistics of averaged weights."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_twa.trainer.borrowed_optimizer import faces, replace_attribute
from lightning_twa.trainer.data import own_copy
from lightning_twa.trainer.features import is_a
from lightning_twa.trainer.progress_bar import show_progress

__all__ = [
    "modules_in_training",
    "random_states",
    "random_states_kept",
    "training_steps",
    "try_training_step",
    "without_traces",
]

LOGGING = ("log", "log_dict")
FROZEN = 2  # times the bytes of what is trained


def modules_in_training(trainer: Trainer, module: LightningModule) -> set[nn.Module]:
    """The modules that are in training mode during training, also while validation runs."""
    if not trainer.validating:
        return {m for m in module.modules() if m.training}
    captured = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return {m for name, m in module.named_modules() if captured.get(name, m.training)}


def training_steps(
    trainer: Trainer,
    module: LightningModule,
    combined_loader: Any,
    training: Collection[nn.Module],
    max_batches: int | None,
    *,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    hooks: Sequence[Callable[[Any, int], Any]] = (),
) -> int:
    """Run ``training_step`` on the training data without gradients and without traces.

    Nothing is logged, metrics keep their state, the random state and the modules' modes are as
    before.

    Args:
        trainer: The Trainer.
        module: The module.
        combined_loader: From :meth:`TrainerSwitch.user_training_loader`.
        training: The modules to have in training mode.
        max_batches: At most so many batches.
        around: Entered around each step.
        hooks: Called with each batch, on its device, and its index before the step.

    Returns:
        The number of batches.
    """
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states_kept())
        stack.enter_context(_training_stage(trainer))
        stack.enter_context(_modes(module, training))
        stack.enter_context(_gradients_wanted_as_before(module))
        stack.enter_context(_logging_off(module))
        stack.enter_context(_metrics_kept(module))
        if not module.automatic_optimization:
            stack.enter_context(_manual_steps_off(trainer, module))
        what = "re-estimating BatchNorm statistics"
        tick = stack.enter_context(show_progress(trainer, what, " batches", max_batches))
        for batch in _second_pass(combined_loader, stack.callback):
            if max_batches is not None and batches >= max_batches:
                break
            with around():
                _training_step(trainer, module, batch, batches, hooks)
            batches += 1
            tick(1)
    return batches


def try_training_step(trainer: Trainer, module: LightningModule, loader: Any) -> None:
    """Run ``training_step`` on the first batch of a loader without traces: nothing is logged, no
    gradient is computed, buffers, metrics and random states are as before.

    Args:
        trainer: The Trainer, in training.
        module: The module.
        loader: What a ``train_dataloader`` hook may return.

    Raises:
        Exception: What the step raises.
    """
    combined = loader
    if not is_a(loader, "CombinedLoader"):
        combined = CombinedLoader(loader, "max_size_cycle")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # a step may need gradients of its own
        stack.enter_context(random_states_kept())
        stack.enter_context(_training_stage(trainer))
        stack.enter_context(_logging_off(module))
        stack.enter_context(_metrics_kept(module))
        stack.enter_context(_buffers_kept(module))
        for batch in _second_pass(combined, stack.callback):
            _training_step(trainer, module, batch, 0, ())
            break


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The global random states are as before afterwards, after an exception too, which Lightning's
    ``isolate_rng`` does not see to.
    """
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextmanager
def without_traces(
    trainer: Trainer, module: LightningModule, in_training: Collection[nn.Module]
) -> Iterator[Callable[..., Any]]:
    """Lets ``training_step`` be run on batches, without gradients: nothing is logged, and buffers,
    metrics, modes and random states are as before.

    Args:
        trainer: The Trainer.
        module: The module.
        in_training: The modules to have in training mode.

    Returns:
        A function of a batch, its index and hooks, which returns what the step does.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states_kept())
        stack.enter_context(_training_stage(trainer))
        stack.enter_context(_modes(module, in_training))
        stack.enter_context(_gradients_wanted_as_before(module))
        stack.enter_context(_logging_off(module))
        stack.enter_context(_metrics_kept(module))
        stack.enter_context(_buffers_kept(module))
        stack.enter_context(_frozen_kept(module))
        yield partial(_training_step, trainer, module)


@contextmanager
def _frozen_kept(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients have their values again: a step may move them itself, as those
    of a momentum encoder. A backbone that is much larger than what is trained is no such thing, and
    has no room for a copy.
    """
    held = [p for p in module.parameters() if not is_lazy(p)]
    own = [getattr(p, "_local_tensor", p) for p in held if not p.requires_grad]  # of a shard
    if sum(t.nbytes for t in own) > FROZEN * sum(p.nbytes for p in held if p.requires_grad):
        own = []
    before = [t.detach().clone() for t in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(own, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """The buffers have their values again afterwards, and are the tensors that they were."""
    kept = [
        (owner._buffers, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, before in kept:
            plain = buffer.layout == torch.strided and not buffer.is_quantized
            if not plain or buffer.shape != before.shape:
                buffers[name] = before
                continue
            buffers[name] = buffer
            if not torch.equal(buffer, before):  # BatchNorm does not count its writing as a version
                with torch.no_grad():
                    buffer.copy_(before)


def _second_pass(combined_loader: Any, at_exit: Callable[..., Any]) -> Iterator[Any]:
    """Batches of a loader that may be in the middle of an epoch, which is not disturbed."""
    second = own_copy(combined_loader)
    for restore in [r for loader in second.flattened for r in random_states(loader)]:
        at_exit(restore)
    at_exit(second.reset)
    for batch, _, _ in iter(second):
        yield batch


def random_states(loader: Any) -> Iterator[Callable[[], Any]]:
    """Functions that bring random states of a loader's own parts back to what they are now."""
    batches = getattr(loader, "batch_sampler", None)
    parts = [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    parts += [getattr(part, "data_source", None) for part in list(parts)]
    dataset = getattr(loader, "dataset", None)
    for owner in (loader, *parts, dataset, getattr(dataset, "dataset", None)):  # of a Subset
        for source in list(getattr(owner, "__dict__", {}).values()):
            if isinstance(source, torch.Generator):
                yield partial(source.set_state, source.get_state())
            elif isinstance(source, random.Random):
                yield partial(source.setstate, source.getstate())
            elif isinstance(source, np.random.Generator):
                state = copy.deepcopy(source.bit_generator.state)
                yield partial(setattr, source.bit_generator, "state", state)
            elif isinstance(source, np.random.RandomState):
                yield partial(source.set_state, source.get_state())


@contextmanager
def _modes(module: nn.Module, training: Collection[nn.Module]) -> Iterator[None]:
    """Have exactly the given modules in training mode, then as before."""
    before = {m: m.training for m in module.modules()}
    try:
        for m in before:
            m.training = m in training
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


@contextmanager
def _logging_off(module: LightningModule) -> Iterator[None]:
    """``self.log`` and ``self.log_dict`` of the module do nothing."""

    def ignore(*args: Any, **kwargs: Any) -> None: ...

    attributes: dict[str, Any] = vars(module)  # an instance's attribute hides the class's method
    hidden = {name: attributes.pop(name) for name in LOGGING if name in attributes}
    try:
        attributes.update(dict.fromkeys(LOGGING, ignore))
        yield
    finally:
        for name in LOGGING:
            del attributes[name]
        attributes.update(hidden)


@contextmanager
def _gradients_wanted_as_before(module: LightningModule) -> Iterator[None]:
    """A step that toggles optimizers, and fails in between, leaves parameters frozen."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    toggled = dict(module._param_requires_grad_state)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        module._param_requires_grad_state = toggled


@contextmanager
def _manual_steps_off(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """A module that steps its own optimizers steps nothing: closures are evaluated, gradients are
    neither computed nor cleared, schedulers stay.
    """

    def ignore(*args: Any, **kwargs: Any) -> None: ...

    def evaluate(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        return None if closure is None else closure()

    with ExitStack() as stack:
        changes: list[tuple[Any, str, Any]] = [
            (module, "manual_backward", ignore),
            (module, "clip_gradients", ignore),
            *((config.scheduler, "step", ignore) for config in trainer.lr_scheduler_configs),
        ]
        for optimizer in faces(trainer):
            changes += [(optimizer, "step", evaluate), (optimizer, "zero_grad", ignore)]
        for owner, name, value in changes:
            replace_attribute(stack, owner, name, value)
        yield


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Metrics in the module are reset, and have their state again afterwards."""
    bookkeeping = ("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache")
    saved = []
    for metric in module.modules():
        if isinstance(metric, Metric):
            # reset() clears lists in place and replaces tensors.
            state = {
                name: list(value) if isinstance(value, list) else value
                for name, value in metric.metric_state.items()
            }
            state.update({n: metric.__dict__[n] for n in bookkeeping if n in metric.__dict__})
            saved.append((metric, state))
    try:
        for metric, _ in saved:
            metric.reset()
        yield
    finally:
        for metric, state in saved:
            for name, value in state.items():
                setattr(metric, name, value)


@contextmanager
def _training_stage(trainer: Trainer) -> Iterator[None]:
    """Be in the training stage, as a module's hooks see it, also where validation is running."""
    stage = trainer.state.stage
    assert stage is not None, "a run is in some stage"
    trainer.state.stage = type(stage).TRAINING
    try:
        yield
    finally:
        trainer.state.stage = stage


def _training_step(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    batch_idx: int,
    hooks: Sequence[Callable[[Any, int], Any]],
) -> Any:
    """Run the module's ``training_step`` on a batch from a loader, as the Trainer would."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    for hook in hooks:
        hook(batch, batch_idx)
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    with trainer.precision_plugin.train_step_context():
        return module.training_step(*arguments.values())
