"""States of the module in a checkpoint beside ``state_dict``: what the module makes of its state
when it is loaded (renamed, converted, cut) is done to them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_twa.candidates import (
    Candidate,
    Store,
    check_files,
    copy_into,
    misfit_of,
    take_anew,
)
from lightning_twa.checkpoint import RAW_WEIGHTS
from lightning_twa.machine import gather_objects
from lightning_twa.phases.temporary import copies_of
from lightning_twa.trainer import LoadHook

__all__ = ["load_candidates", "load_raw_weights"]


def load_raw_weights(
    module: LightningModule, checkpoint: Mapping[str, Any], hook: LoadHook
) -> None:
    """Load the weights to go on from where a checkpoint's ``state_dict`` is an average.

    Lightning's ``WeightAveraging`` uses the same key, beside ``averaging_state``; a run that goes
    on with this callback instead starts from its average.

    Args:
        module: With the checkpoint's ``state_dict`` loaded.
        checkpoint: Of the Trainer.
        hook: Of the module, that has seen the checkpoint.
    """
    if RAW_WEIGHTS in checkpoint and "averaging_state" not in checkpoint:
        state = hook.apply(checkpoint[RAW_WEIGHTS])
        module.load_state_dict(state, strict=module.strict_loading)


def load_candidates(
    store: Store, module: LightningModule, before: Mapping[str, Any], hook: LoadHook
) -> bool:
    """Take the candidates of a checkpoint anew, as the module would load them, where its hooks edit
    what they load or the candidates are of another form of it. Every process calls it.

    Args:
        store: The candidates.
        module: With the checkpoint's weights loaded, which it has afterwards too.
        before: ``state_dict`` of the checkpoint, before the module's hook.
        hook: Of the module, that has seen the checkpoint.

    Returns:
        Whether they were taken anew.

    Raises:
        ValueError: Naming the candidate and the tensor that cannot be given to the module.
        CandidateFileError: Naming a damaged file, before names and shapes in it are believed.
    """
    if any(gather_objects(hook.edits or misfit_of(store, module) is not None)):
        check_files(store)
    misfit = misfit_of(store, module)
    if misfit is None and not hook.edits:
        return False
    if store.shards:
        raise ValueError(
            "The module's on_load_checkpoint edits the state of the checkpoint, but candidates "
            "with sharded parameters cannot be edited alike. Begin the phase anew: load the "
            "weights, without the state of TWACallback."
        )
    now = copies_of(module.state_dict())
    try:
        take_anew(store, module, lambda candidate: _load(module, candidate, before, hook, misfit))
    finally:
        module.load_state_dict(now, strict=module.strict_loading)
    return True


def _load(
    module: LightningModule,
    candidate: Candidate,
    before: Mapping[str, Any],
    hook: LoadHook,
    misfit: str | None,
) -> None:
    state = _as_in_checkpoint(module, candidate, before, misfit)
    try:
        module.load_state_dict(hook.apply(state), strict=module.strict_loading)
    except Exception as error:  # of a hook of the user's, too
        raise ValueError(
            f"Candidate {candidate.name!r} of the checkpoint cannot be loaded as its state_dict "
            f"was ({type(error).__name__}: {error}). {misfit or ''} Let on_load_checkpoint edit "
            f"any state of this form alike, or begin the phase anew: load the weights, without "
            f"the state of TWACallback."
        ) from error


def _as_in_checkpoint(
    module: LightningModule, candidate: Candidate, before: Mapping[str, Any], misfit: str | None
) -> dict[str, Any]:
    """A candidate in the form of the checkpoint's ``state_dict``; what it has not is as there."""
    held = {**candidate.parameters, **candidate.buffers}
    if held.keys() <= before.keys():
        kept = {_place(before[name]): value for name, value in held.items()}
        tied = {n: kept.get(_place(v), v) for n, v in before.items() if isinstance(v, Tensor)}
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        known = {name for name in trained if name in before and _place(before[name]) not in kept}
        if lost := sorted(known - held.keys()):
            raise ValueError(
                f"Candidate {candidate.name!r} of the checkpoint has no tensor {lost[0]!r}, which "
                f"its state_dict has: it is damaged. Resume from another checkpoint."
            )
        state = {**before, **tied, **held}
    elif misfit is None:  # other names than the parameters': state_dict() is overridden
        copy_into(module, held)
        state = module.state_dict()
    else:
        lacking = sorted(held.keys() - before.keys())
        raise ValueError(
            f"{misfit} The checkpoint's state_dict has no tensor {lacking[0]!r}, which the "
            f"candidate has, so it is not known what the module would make of it. Begin the phase "
            f"anew: load the weights, without the state of TWACallback."
        )
    return copies_of(state)


def _place(tensor: Any) -> Any:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
