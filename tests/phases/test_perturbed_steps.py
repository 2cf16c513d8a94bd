"""Steps that evaluate the loss at other weights: SAM and masks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from helpers.common import Regressor, loader, trainer, weights
from helpers.ddp import fit
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, equal, run
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


@pytest.mark.parametrize("kind", ["sam", "mask"])
def test_validation_and_checkpoints_never_see_other_weights(tmp_path, kind) -> None:
    options: dict[str, Any] = {
        "sam": {"solver": SolverConfig(sam_rho=0.5)},
        "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    }[kind]
    twa = TWACallback(3, collect=CollectConfig(start=0), **options)

    class Look(L.Callback):
        seen = 0

        def check(self, module: Any) -> None:
            if twa.phase == "optimize":
                found = weights(module)
                twa._run.optimization.optimizer.write_parameters()
                assert torch.equal(found, weights(module))
                self.seen += 1

        def on_validation_batch_end(self, t: Any, pl_module: Any, *args: Any) -> None:
            self.check(pl_module)

        def on_train_batch_end(self, t: Any, pl_module: Any, *args: Any) -> None:
            self.check(pl_module)

    look = Look()
    trainer(tmp_path, callbacks=[twa, look], val_check_interval=2).fit(
        Regressor(), loader(), loader(32)
    )
    assert look.seen > 12
    assert twa.phase == "done"


@pytest.mark.parametrize("kind", ["sam", "mask"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 2}, "does not go with gradient accumulation"),
        ({"precision": "16-mixed"}, "does not go with precision='16-mixed'"),
    ],
)
def test_what_evaluates_the_loss_outside_of_the_step(tmp_path, kind, arguments, message) -> None:
    options: dict[str, Any] = {
        "sam": {"solver": SolverConfig(sam_rho=0.5)},
        "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    }[kind]
    if arguments == {"precision": "16-mixed"}:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        arguments = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    the_trainer = trainer(tmp_path, callbacks=[TWACallback(3, **options)], **arguments)
    with pytest.raises(ValueError, match=message):
        the_trainer.fit(Regressor(), loader())


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", ["sam", "mask", "simplex"])
def test_these_resume_exactly(tmp_path, kind) -> None:
    options: dict[str, Any] = {
        "sam": {"solver": SolverConfig(sam_rho=0.5)},
        "mask": {"subspace": SubspaceConfig(parametrization="mask", blocks="tensor")},
        "simplex": {"subspace": SubspaceConfig(parametrization="simplex", bits=4)},
    }[kind]

    def make_twa() -> TWACallback:
        return TWACallback(3, collect=CollectConfig(start=0), **options)

    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=3)
    whole = run(tmp_path, Regressor, make_twa, saver=saver)
    for path in sorted((tmp_path / "ck").glob("*=*.ckpt")):
        assert differences(whole, run(tmp_path, Regressor, make_twa, path)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_two_processes_draw_the_same_masks(tmp_path, distribute) -> None:
    subspace = SubspaceConfig(parametrization="mask", blocks="tensor")
    twa = TWACallback(4, subspace=subspace, distribute=distribute)
    first, second = fit(tmp_path / "r", twa, Regressor())
    assert torch.equal(first["averaging_weights"], second["averaging_weights"])
    assert set(first["averaging_weights"].flatten().tolist()) == {0.0, 1.0}
    assert equal(first["state"], second["state"])
