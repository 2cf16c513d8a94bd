"""What stops a run: it begins the phase if asked to, ends it, or ends the run as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor

from helpers.common import Recorder, Regressor, flat, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import ordered
from helpers.runs import fit, is_borrowed
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class StopAt(EarlyStopping):
    """Wants to stop after an epoch, whatever the metric, once."""

    def __init__(self, epoch: int, at_epoch_end: bool) -> None:
        super().__init__("val_loss", check_on_train_epoch_end=at_epoch_end)
        self.epoch = epoch

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        return self.now == self.epoch, None

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        self.now = trainer.current_epoch
        super()._run_early_stopping_check(trainer)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("data", ["train", "val"])
def test_the_phase_begins_where_early_stopping_would_end_the_run(
    tmp_path, data, at_epoch_end
) -> None:
    collect = CollectConfig(start=0)
    torch.manual_seed(0)
    expected = Regressor(batchnorm=True)
    module = Regressor(batchnorm=True)
    module.load_state_dict(expected.state_dict())
    planned = TWACallback(3, data, collect=collect)
    trainer(tmp_path, callbacks=[planned], max_epochs=5).fit(expected, loader(), loader(32, seed=1))

    twa = TWACallback(6, data, collect=collect, start_on_early_stopping=True)
    recorder, stop = Recorder(twa), StopAt(2, at_epoch_end)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, recorder], max_epochs=8)
    torch.manual_seed(0)
    Regressor(batchnorm=True)  # draws what the first run drew
    the_trainer.fit(module, loader(), loader(32, seed=1))
    assert sorted(recorder.epochs) == [0, 1, 2, 3, 4]
    assert the_trainer.current_epoch == 5
    assert the_trainer.max_epochs == 8  # given back
    assert twa.candidate_names == ["epoch=0", "epoch=1", "epoch=2"]
    if data == "train":  # the validation data of the phase are in random order
        assert torch.equal(weights(module), weights(expected))
    assert twa.phase == "done"
    assert "_run_early_stopping_check" not in vars(stop)


@pytest.mark.parametrize("epoch", [1, 4])
def test_an_exception_gives_everything_back(tmp_path, epoch) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == epoch:
                raise RuntimeError("CRASH")

    twa = TWACallback(6, collect=CollectConfig(start=0), start_on_early_stopping=True)
    stop = StopAt(2, at_epoch_end=True)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, Fails()], max_epochs=8)
    with pytest.raises(RuntimeError, match="CRASH"):
        the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
    assert twa.phase == ("collect" if epoch == 1 else "optimize")
    assert the_trainer.max_epochs == 8
    assert "_run_early_stopping_check" not in vars(stop)
    assert not is_borrowed(the_trainer)


@pytest.mark.parametrize("what", ["second group", "second cycle"])
def test_a_signal_in_a_later_part_gives_everything_back(tmp_path, monkeypatch, what) -> None:
    from lightning_twa.phases import span

    calls, build = [], span.build_subspace

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise SystemExit("signal")
        return build(*args, **kwargs)

    monkeypatch.setattr(span, "build_subspace", fails)
    collect = CollectConfig(start=0)
    twa = TWACallback(2, "val", cycles=2, collect=collect)
    if what == "second group":
        twa = TWACallback(4, "val", collect=collect, subspace=SubspaceConfig(group_size=2))
    module, train, val = Regressor(), loader(), loader(32, seed=1)
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=8)
    with pytest.raises(SystemExit, match="signal"):
        the_trainer.fit(module, train, val)
    assert not is_borrowed(the_trainer)
    assert the_trainer.fit_loop._data_source.instance is train
    if what == "second group":  # its state is still one that goes on
        state = twa.state_dict()
        assert state["groups"]["results"] == []
        beta = twa.averaging_weights[:, 0]
        mix = sum(b * flat(c.parameters) for b, c in zip(beta, twa.candidates, strict=True))
        torch.testing.assert_close(weights(module), mix, rtol=1e-5, atol=1e-6)


def test_patience_counts_anew_in_the_phase(tmp_path) -> None:
    stop = EarlyStopping("val_loss", patience=2, mode="max", check_on_train_epoch_end=True)
    twa = TWACallback(
        12, collect=CollectConfig(start=0), start_on_early_stopping=True, subspace=SubspaceConfig()
    )
    recorder = Recorder(twa)
    the_trainer = trainer(tmp_path, callbacks=[stop, twa, recorder], max_epochs=16)
    the_trainer.fit(Regressor(lr=0.001), loader(), loader(32, seed=1))
    phases = [phase for phase, _ in recorder.steps]
    # the loss falls: two epochs without a larger one end collecting; two more the phase
    assert phases.count("collect") == 3 * 4
    assert len(phases) >= 5 * 4
    assert twa.phase == "done"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_patience_counts_anew_in_a_phase_that_is_resumed(tmp_path) -> None:
    def fit(ckpt: Path | None) -> tuple[Tensor, int]:
        stop = EarlyStopping("val_loss", patience=2, mode="max", check_on_train_epoch_end=True)
        twa = TWACallback(12, collect=CollectConfig(start=0), start_on_early_stopping=True)
        saver = ModelCheckpoint(
            tmp_path / ("whole" if ckpt is None else "resumed"),
            filename="{epoch}",
            save_top_k=-1,
            save_on_train_epoch_end=True,
        )
        torch.manual_seed(0 if ckpt is None else 9)
        module = Regressor(lr=0.001)
        the_trainer = trainer(
            tmp_path, callbacks=[stop, twa, saver], max_epochs=16, enable_checkpointing=True
        )
        the_trainer.fit(module, ordered(), loader(32, seed=1), ckpt_path=ckpt)
        return weights(module), the_trainer.current_epoch

    expected, epochs = fit(None)
    assert epochs > 4
    files = {int(file.stem[6:]): file for file in (tmp_path / "whole").glob("*=*.ckpt")}
    assert sorted(files) == list(range(epochs))
    for epoch in range(epochs - 1):  # the last is that of a finished run
        file = files[epoch]
        found, ended = fit(file)
        assert ended == epochs, file.name
        assert torch.equal(found, expected), file.name


def test_other_stops_and_too_few_candidates_stop_as_ever(tmp_path) -> None:
    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    few = ", or CollectConfig.start: there were 0 candidates, and start_on_early_stopping needs two"
    cases = [([Stops(), StopAt(9, True)], 0, ""), ([StopAt(2, True)], 4, few)]
    for callbacks, start, ending in cases:
        twa = TWACallback(6, collect=CollectConfig(start=start), start_on_early_stopping=True)
        the_trainer = trainer(tmp_path, callbacks=[*callbacks, twa], max_epochs=8)
        message = f"^TWA never ran: .* [Ll]ower start_epoch to run it{ending}\\.$"
        with pytest.warns(UserWarning, match=message):
            the_trainer.fit(Regressor(), loader(), loader(32, seed=1))
        assert the_trainer.current_epoch == 3
        assert twa.phase == "collect"


@pytest.mark.parametrize("written", ["epoch", "step"])
def test_a_phase_that_early_stopping_began_resumes(tmp_path, written) -> None:
    class Stop(StopAt):
        def __init__(self) -> None:
            super().__init__(2, at_epoch_end=True)

    def make_twa() -> TWACallback:
        return TWACallback(6, collect=CollectConfig(start=0), start_on_early_stopping=True)

    every = {"every_n_epochs": 1} if written == "epoch" else {"every_n_train_steps": 3}
    results = {}
    for file in [None, *range(9)]:
        folder = tmp_path / "checkpoints"
        if file is None:
            saver = ModelCheckpoint(
                folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True, **every
            )
        files = sorted(folder.glob("*=*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
        if file is not None and file >= len(files):
            continue
        torch.manual_seed(0 if file is None else 9)
        module, twa, stop = Regressor(batchnorm=True), make_twa(), Stop()
        callbacks = [stop, twa, *([saver] if file is None else [])]
        the_trainer = trainer(
            tmp_path, callbacks=callbacks, max_epochs=8, enable_checkpointing=file is None
        )
        path = None if file is None else files[file]
        the_trainer.fit(module, ordered(), loader(32, seed=1), ckpt_path=path)
        results[None if path is None else path.name] = (weights(module), the_trainer.current_epoch)
    assert len(results) > 4
    # Resumed from a checkpoint between an epoch's last batch and its end, no EarlyStopping is asked
    # about that epoch, with this callback or without.
    if written == "step":
        assert results.pop("step=12.ckpt")[1] == 8
    for name, (value, epoch) in results.items():
        assert epoch == 5, name
        assert torch.equal(value, results[None][0]), name


class SteppedTimer(Timer):
    """Lightning's limit on time, on a clock that goes on by a second with every batch."""

    seconds = 0

    def time_elapsed(self, *args: Any) -> float:
        return self.seconds

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += 1
        super().on_train_batch_end(*args, **kwargs)


def test_a_phase_with_a_constant_rate_goes_on_until_time_is_over(tmp_path) -> None:
    twa = TWACallback(start_epoch=2, solver=SolverConfig(lr=0.1, schedule="constant"))
    timer = SteppedTimer(duration={"seconds": 18})
    _, recorder, the_trainer = fit(tmp_path, twa, max_epochs=-1, callbacks=[timer])
    assert the_trainer.global_step == 18
    assert [phase for phase, _ in recorder.steps].count("collect") == 8
    assert twa.phase == "done"
