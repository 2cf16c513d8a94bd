"""Checkpoints of every phase: readable safely, by anyone, and with the weights they stand for."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, ordered, run, state, twa

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def fit(tmp_path, the_twa: TWACallback, module: Any = None, callbacks: Any = (), **kwargs: Any):
    """Fit with data whose order is fixed; returns module, recorder, trainer."""
    module, recorder = module or Regressor(), Recorder(the_twa)
    val = kwargs.pop("val", ordered(32, seed=1))
    the_trainer = trainer(
        tmp_path,
        callbacks=[the_twa, recorder, *callbacks],
        enable_checkpointing=True,
        **kwargs,
    )
    the_trainer.fit(module, ordered(), val)
    return module, recorder, the_trainer


def statistics(module: torch.nn.Module) -> list[Tensor]:
    """Running mean and variance of every BatchNorm."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [t.clone() for m in norms for t in (m.running_mean, m.running_var)]


@pytest.mark.matrix(3)
@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.parametrize("phase", ["collect", "optimize", "done"])
def test_a_checkpoint_of_every_phase_loads_with_weights_only(tmp_path, phase, data) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    module, recorder, _ = fit(tmp_path, twa(data=data), Regressor(True), [saver])
    epoch = {"collect": 2, "optimize": 4, "done": 5}[phase]
    path = tmp_path / f"epoch={epoch}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (own,) = [v for k, v in checkpoint["callbacks"].items() if "TWACallback" in k]
    assert own["phase"] == phase
    assert own["format_version"] == 1
    assert ("candidates" in own) is (phase != "done"), "a finished run needs no candidates"
    assert own["candidate_names"] == [f"epoch={e}" for e in range(1, min(epoch, 3) + 1)]
    loaded = Regressor.load_from_checkpoint(path, batchnorm=True, weights_only=True)
    assert torch.equal(weights(loaded), recorder.epochs[epoch])
    if phase == "done":
        assert equal(state(loaded), state(module))


def test_load_from_checkpoint_gives_the_average_of_the_candidates(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    _, recorder, _ = fit(tmp_path, twa(), None, [saver])
    for epoch in (4, 5):
        path = tmp_path / f"epoch={epoch}.ckpt"
        (own,) = [
            v
            for k, v in torch.load(path, weights_only=True)["callbacks"].items()
            if "TWACallback" in k
        ]
        beta = own["averaging_weights"]
        assert beta.shape == (3, 1)
        assert beta.sum().item() == pytest.approx(1, abs=1e-12)
        candidates = torch.stack([recorder.epochs[e] for e in (1, 2, 3)])
        average = (beta * candidates).sum(0)
        loaded = Regressor.load_from_checkpoint(path)
        torch.testing.assert_close(weights(loaded), average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(average, candidates.mean(0), rtol=1e-3), "nothing was learned"


def test_a_checkpoint_before_the_first_candidate_holds_nothing_of_the_callback(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, twa(), None, [saver])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert not [k for k in checkpoint["callbacks"] if "TWACallback" in k]


def test_weights_only_checkpoints_can_be_written(tmp_path) -> None:
    saver = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True, save_on_train_epoch_end=True
    )
    _, recorder, _ = fit(tmp_path, twa(), None, [saver])
    for epoch in range(6):
        loaded = Regressor.load_from_checkpoint(tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(weights(loaded), recorder.epochs[epoch])


@pytest.mark.filterwarnings("ignore:In trainer.(test|validate)\\(\\) the model does not hold")
@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("best", ["collect", "optimize", "done"])
def test_testing_the_best_checkpoint_leaves_what_the_run_learned(tmp_path, best, stage) -> None:
    class Score(Regressor):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            epoch = {"collect": 2, "optimize": 4, "done": 5}[best]
            self.log("score", float(abs(self.trainer.current_epoch - epoch)))

    the_twa = twa()
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="min")
    module, recorder, the_trainer = fit(tmp_path, the_twa, Score(), [saver])
    learned, names = the_twa.averaging_weights.clone(), list(the_twa.candidate_names)
    written = the_twa.state_dict()
    with torch.no_grad():  # so that the test below is known to load the file
        module.net[0].weight.zero_()
    getattr(the_trainer, stage)(module, loader(), ckpt_path="best", verbose=False)
    epoch = {"collect": 2, "optimize": 4, "done": 5}[best]
    assert torch.equal(weights(module), recorder.epochs[epoch])
    assert torch.equal(the_twa.averaging_weights, learned)
    assert the_twa.candidate_names == names
    assert the_twa.phase == "done"
    assert equal(the_twa.state_dict(), written)


def test_testing_a_checkpoint_with_a_new_trainer_restores_nothing(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module, _, _ = fit(tmp_path, twa(), None, [saver])
    other, the_twa = Regressor(), twa()
    tester = trainer(tmp_path, callbacks=[the_twa, saver], enable_checkpointing=True)
    tester.test(other, loader(), ckpt_path=saver.last_model_path, verbose=False)
    assert torch.equal(weights(other), weights(module))
    assert the_twa.phase == "collect"
    assert the_twa.num_candidates == 0


class StopAt(EarlyStopping):
    """Stops where it is asked, as early stopping does: at the end of validation or of an epoch."""

    def __init__(self, step: int, **kwargs: Any) -> None:
        super().__init__("val_loss", **kwargs)
        self.step = step

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


ENDS: dict[str, Any] = {
    "max_epochs": ({}, []),
    "max_epochs, validation within epochs": ({"val_check_interval": 2}, []),
    "max_epochs, no validation": ({"val": None}, []),
    "max_epochs, validation every 4 epochs": ({"check_val_every_n_epoch": 4}, []),
    "max_steps at an epoch's end": ({"max_steps": 20, "max_epochs": -1}, []),
    "max_steps within an epoch": ({"max_steps": 22, "max_epochs": -1}, []),
    "max_steps, validation within epochs": (
        {"max_steps": 22, "max_epochs": -1, "val_check_interval": 2},
        [],
    ),
    "stopped at the end of validation": ({"max_epochs": 9}, [(20, False)]),
    "stopped at the end of an epoch": ({"max_epochs": 9}, [(20, True)]),
    "stopped within an epoch": ({"max_epochs": 9, "val_check_interval": 2}, [(22, False)]),
}


# Lightning writes no checkpoint between the end of such runs and what ends them, if asked to write
# at the end of validation.
NOT_WRITTEN = (
    "max_steps within an epoch",
    "max_epochs, validation every 4 epochs",
    "stopped at the end of an epoch",
)


# `make test` has every end with the training data, and with the validation data where a monitored
# checkpoint is written at the end of validation.
SOME = [(end, None, "train", None) for end in ENDS]
SOME += [(end, False, "val", "val_loss") for end in ENDS]
ALL = [
    (end, at_epoch_end, *what)
    for what in [("train", None), ("val", "val_loss")]
    for at_epoch_end in (True, False, None)
    for end in ENDS
]


@pytest.mark.matrix(8)
@pytest.mark.parametrize(
    ("end", "at_epoch_end", "data", "monitor"),
    [*SOME, *(pytest.param(*m, marks=pytest.mark.long) for m in ALL if m not in SOME)],
)
def test_the_last_checkpoint_holds_the_finished_average(
    tmp_path, end, at_epoch_end, monitor, data
) -> None:
    kwargs, stops = dict(ENDS[end][0]), ENDS[end][1]
    if kwargs.get("val", True) is None and (monitor or data == "val" or at_epoch_end is False):
        pytest.skip("needs validation")
    if end in NOT_WRITTEN and (not at_epoch_end if "every 4" in end else at_epoch_end is False):
        pytest.skip("Lightning writes no checkpoint at the end of such a run")
    if "every 4" in end and monitor:
        pytest.skip("nothing to monitor at the end of such a run")
    the_twa = twa(data=data)
    saver = ModelCheckpoint(
        tmp_path,
        monitor=monitor,
        save_last=True,
        save_top_k=-1,  # else Lightning writes the last one only when it is among the best
        save_on_train_epoch_end=at_epoch_end,
    )
    before: list[list[Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if the_twa.phase == "optimize":
                before.append(statistics(pl_module))

    stopping = [StopAt(step, check_on_train_epoch_end=at) for step, at in stops]
    module, _, the_trainer = fit(
        tmp_path, the_twa, Regressor(True), [Watch(), *stopping, saver], **kwargs
    )
    assert the_twa.phase == "done"
    assert all(not equal(s, statistics(module)) for s in before), "not re-estimated"
    checkpoint = torch.load(saver.last_model_path, weights_only=True)
    assert checkpoint["global_step"] == the_trainer.global_step
    (own,) = [v for k, v in checkpoint["callbacks"].items() if "TWACallback" in k]
    assert equal(checkpoint["state_dict"], state(module))
    assert own["phase"] == "done"


def test_with_validate_average_checkpoints_hold_the_validated_average_and_raw_weights(
    tmp_path,
) -> None:
    """The monitored metric is that of ``state_dict``; a resumed run goes on from the other."""
    seen: dict[str, dict[str, Tensor]] = {}

    class Seen(L.Callback):
        """What was validated, and the weights that training goes on from."""

        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *a: Any) -> None:
            if not trainer.sanity_checking:
                seen[f"average {trainer.current_epoch}"] = state(pl_module)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            seen[f"raw {trainer.current_epoch}"] = state(pl_module)

    def twa() -> TWACallback:
        return TWACallback(4, collect=CollectConfig(start=0), validate_average=True)

    def make() -> Regressor:
        return Regressor(batchnorm=True)

    saver = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False
    )
    plain_twa = run(tmp_path, make, lambda: TWACallback(4, collect=CollectConfig(start=0)))
    L.seed_everything(1, verbose=False)
    module, the_twa = make(), twa()
    the_trainer = trainer(tmp_path, callbacks=[the_twa, Seen(), saver], enable_checkpointing=True)
    the_trainer.fit(module, ordered(), ordered(32, seed=1))
    assert equal(state(module), plain_twa.state), "validation changes nothing"
    for epoch in range(6):
        path = tmp_path / f"epoch={epoch}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        # the first validation comes before the first candidate
        assert equal(checkpoint["state_dict"], seen[f"average {epoch}"])
        assert ("current_model_state" in checkpoint) == (1 <= epoch < 4)
        if 1 <= epoch < 4:
            assert equal(checkpoint["current_model_state"], seen[f"raw {epoch}"])
            assert not equal(checkpoint["state_dict"], seen[f"raw {epoch}"])
        loaded = make()
        loaded.load_state_dict(checkpoint["state_dict"])
        (metrics,) = trainer(tmp_path).validate(loaded, ordered(32, seed=1), verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(checkpoint["callbacks"][saver.state_key]
                                                          ["current_score"]))  # fmt: skip
        if epoch < 5:
            resumed = run(tmp_path / "resumed", make, twa, ckpt_path=path)
            assert equal(resumed.state, state(module)), epoch
