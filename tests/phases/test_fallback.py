"""A phase that fails loses nothing of the training before it: the run ends with the uniform average
of its candidates, everywhere, and says how the phase can be run from them.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from helpers.common import Frozen, Regressor, weights
from helpers.fallback import (
    KINDS,
    break_step,
    break_switch,
    check_sound_end,
    fit,
    mean_of,
    planned,
    run_from_files,
    twa,
)
from helpers.resume import equal
from helpers.runs import is_borrowed
from lightning_twa import SolverConfig, SubspaceConfig
from lightning_twa.phases import span
from lightning_twa.subspace import Subspace
from lightning_twa.subspace.training import solvers

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:The TWA phase (could|failed)"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.mark.parametrize("where", ["build", "choose", "optimizer", "data", "report"])
def test_a_phase_that_cannot_begin(tmp_path, monkeypatch, where) -> None:
    break_switch(monkeypatch, where)
    callback, module = twa(), Regressor(batchnorm=True)
    with pytest.warns(UserWarning, match="The TWA phase could not begin") as caught:
        _, the_trainer, watch = fit(tmp_path, callback, module)
    (text,) = [str(w.message) for w in caught if "could not begin" in str(w.message)]
    assert "(RuntimeError: planned). The run ends with the uniform average of its 3 cand" in text
    check_sound_end(tmp_path, callback, module, watch)
    assert the_trainer.global_step == 3 * 4 + 1, "one step, so that checkpoints are saved"
    assert not is_borrowed(the_trainer)
    names, candidates = callback.candidate_names, callback.candidates
    monkeypatch.undo()
    again = run_from_files(tmp_path, text, Regressor(batchnorm=True))
    assert again.phase == "done"
    assert again.candidate_names == names
    assert equal([c.parameters for c in again.candidates], [c.parameters for c in candidates])


@pytest.mark.matrix(8)
@pytest.mark.parametrize("step", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_falls_back(tmp_path, monkeypatch, kind, step) -> None:
    callback, module = twa(**KINDS[kind]), Frozen() if kind == "disk" else None
    if step is None:
        break_switch(monkeypatch, "build")
    else:
        break_step(monkeypatch, step)
    with pytest.warns(UserWarning, match="The TWA phase") as caught:
        module, the_trainer, watch = fit(tmp_path, callback, module)
    (text,) = [str(w.message) for w in caught if "The TWA phase" in str(w.message)]
    assert (f"failed in its optimizer step {step} (" if step else "could not begin (") in text
    check_sound_end(tmp_path, callback, module, watch)
    assert the_trainer.global_step == 3 * 4 + (step or 1)
    names = callback.candidate_names
    monkeypatch.undo()
    again = run_from_files(tmp_path, text, Frozen() if kind == "disk" else Regressor(True))
    assert sorted(again.candidate_names) == sorted(names)


def test_a_step_that_fails_moves_nothing_and_the_loss_is_the_model_s(tmp_path, monkeypatch) -> None:
    class Losses(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *a) -> None:
            self.seen.append(outputs["loss"])

    break_step(monkeypatch, 2)
    losses = Losses()
    module, _, watch = fit(tmp_path, twa(), callbacks=[losses])
    assert all(torch.isfinite(loss) for loss in losses.seen)
    assert torch.equal(watch.steps[-1], weights(module))


def test_a_solver_that_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(solvers, "_precondition", planned)
    callback = twa()
    module, _, watch = fit(tmp_path, callback)
    check_sound_end(tmp_path, callback, module, watch)


@pytest.mark.parametrize("kind", ["sam", "mask"])
def test_a_step_that_calls_the_closure_more_than_once(tmp_path, monkeypatch, kind) -> None:
    options: dict[str, Any] = {
        "sam": {"solver": SolverConfig(sam_rho=0.1)},
        "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    }
    break_step(monkeypatch, 4)
    callback = twa(**options[kind])
    module, _, watch = fit(tmp_path, callback)
    check_sound_end(tmp_path, callback, module, watch)


def test_a_group_that_cannot_be_built(tmp_path, monkeypatch) -> None:
    build, calls = span.build_subspace, [0]

    def second(*args: Any, **kwargs: Any) -> Subspace:
        calls[0] += 1
        if calls[0] == 2:
            planned()
        return build(*args, **kwargs)

    monkeypatch.setattr(span, "build_subspace", second)
    callback = twa(4, subspace=SubspaceConfig(group_size=2))
    module, the_trainer, watch = fit(tmp_path, callback, max_epochs=6)
    assert calls == [2]
    assert the_trainer.global_step == 4 * 4 + 4
    check_sound_end(tmp_path, callback, module, watch)


# --- when the run ends


def test_with_accumulation_the_run_ends_with_a_step(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    callback = twa()
    module, the_trainer, watch = fit(tmp_path, callback, accumulate_grad_batches=2)
    assert the_trainer.global_step == 3 * 2 + 1
    check_sound_end(tmp_path, callback, module, watch)


def test_min_epochs_are_kept_and_the_average_with_them(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    callback = twa()
    module, the_trainer, watch = fit(tmp_path, callback, Regressor(), min_epochs=6)
    assert the_trainer.global_step == 6 * 4
    check_sound_end(tmp_path, callback, module, watch)
    for seen in watch.steps[12:]:
        assert torch.equal(seen, weights(module)), "steps change nothing"


def test_early_stopping_that_has_begun_the_phase(tmp_path, monkeypatch) -> None:
    break_switch(monkeypatch, "build")
    callback = twa(7, start_on_early_stopping=True)
    saver = ModelCheckpoint(tmp_path / "k", save_last=True)
    stopper = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    module, the_trainer, watch = fit(tmp_path, callback, callbacks=[saver, stopper])
    assert callback.candidate_names == ["epoch=0", "epoch=1"]
    assert the_trainer.global_step == 2 * 4 + 1
    check_sound_end(tmp_path, callback, module, watch)


@pytest.mark.parametrize("how", ["switch", "step"])
def test_the_next_cycle_goes_on_as_ever(tmp_path, monkeypatch, how) -> None:
    """From the average of the one that has failed."""
    if how == "switch":
        break_switch(monkeypatch, "build")
    else:
        break_step(monkeypatch, 2)

    class Mend(L.Callback):
        seen: Any = None

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                assert callback.phase == "collect"
                self.seen = weights(pl_module)
                monkeypatch.undo()

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                assert callback.phase == "done"
                self.mean = mean_of(callback, pl_module)

    callback, mend = twa(2, cycles=2), Mend()
    with pytest.warns(UserWarning, match=r"This cycle ends with the uniform average of its 2 cand"):
        _, the_trainer, watch = fit(tmp_path, callback, callbacks=[mend], max_epochs=8)
    assert torch.equal(mend.seen, mend.mean)
    assert not torch.equal(watch.steps[16], mend.seen), "training goes on"
    assert the_trainer.global_step == 8 * 4
    assert callback.phase == "done"
    assert callback.candidate_names == ["epoch=4", "epoch=5"]
    assert float(callback.averaging_weights.std()) > 0, "learned"
