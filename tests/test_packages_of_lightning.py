"""The same run with ``lightning`` and with ``pytorch_lightning``, which are two packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as new_callbacks
import pytest
import torch
from torch import Tensor, nn

import lightning_twa
from helpers.common import TESTS, loader, mse, trainer, weights
from helpers.plain import CollectConfig
from lightning_twa import SubspaceConfig, average, plot_averaging_weights

old = pytest.importorskip("pytorch_lightning")
import pytorch_lightning.callbacks as old_callbacks  # noqa: E402

from lightning_twa.pytorch_lightning import TWACallback as OldTWACallback  # noqa: E402

PACKAGES = {
    "lightning": (L, new_callbacks, lightning_twa.TWACallback),
    "pytorch_lightning": (old, old_callbacks, OldTWACallback),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:.*You defined a .validation_step. but have no"),
]


def make_module(package: Any) -> Any:
    class Regressor(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return mse(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", mse(self.net(batch[0]), batch[1]))

        def twa_dataloader(self) -> Any:
            return loader(32, seed=4)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    torch.manual_seed(0)
    return Regressor()


def fit(name: str, tmp_path: Any, others: Any = (), ckpt: Any = None, **kwargs: Any) -> Any:
    """Module, callback and Trainer of a run; ``others`` name callbacks with their arguments."""
    package, callbacks, kind = PACKAGES[name]
    arguments = {"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs}
    twa, module = kind(**arguments), make_module(package)
    more = [getattr(callbacks, other)(**options) for other, options in others]
    trainer = package.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=6,
        logger=False,
        enable_checkpointing=any(other == "ModelCheckpoint" for other, _ in others),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*more, twa],
    )
    torch.manual_seed(1)
    trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt)
    return module, twa, trainer


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("others", "options"),
    [
        ((), {}),
        ((), {"data": "val", "subspace": SubspaceConfig(bits=4, blocks="tensor")}),
        ((), {"data": "twa"}),
        ((), {"cycles": 2, "start_epoch": 2, "collect": CollectConfig(start=0)}),
        ([("GradientAccumulationScheduler", {"scheduling": {0: 1, 3: 2}})], {}),
        (
            [("EarlyStopping", {"monitor": "val_loss", "mode": "max", "patience": 1})],
            {"start_epoch": 5, "collect": CollectConfig(start=0), "start_on_early_stopping": True},
        ),
    ],
    ids=["default", "val", "twa", "cycles", "accumulation", "early stopping"],
)
def test_both_packages_give_the_same_run(tmp_path, others, options) -> None:
    new = fit("lightning", tmp_path, others, **options)
    old_ = fit("pytorch_lightning", tmp_path, others, **options)
    assert new[1].phase == old_[1].phase == "done"
    assert old_[1].candidate_names == new[1].candidate_names
    assert torch.equal(old_[1].averaging_weights, new[1].averaging_weights)
    assert torch.equal(weights(old_[0]), weights(new[0]))
    for name, value in new[0].state_dict().items():
        assert torch.equal(old_[0].state_dict()[name], value), name
    assert [type(o).__name__ for o in old_[2].optimizers] == ["SGD"]


def test_checkpoints_go_from_one_package_to_the_other(tmp_path) -> None:
    saver = {"dirpath": tmp_path, "filename": "{epoch}", "save_top_k": -1}
    module, twa, _ = fit("pytorch_lightning", tmp_path, [("ModelCheckpoint", saver)])
    for epoch in (2, 4):
        resumed, again, _ = fit("lightning", tmp_path, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(weights(resumed), weights(module))
        assert torch.equal(again.averaging_weights, twa.averaging_weights)


def test_what_takes_a_callback_takes_both(tmp_path) -> None:
    _, twa, _ = fit("pytorch_lightning", tmp_path)
    assert len(plot_averaging_weights(twa).axes[0].patches) == 3
    state = average(twa)
    expected = torch.stack([c.parameters["net.0.weight"] for c in twa.candidates]).mean(0)
    torch.testing.assert_close(state["net.0.weight"], expected)


@pytest.mark.parametrize(
    ("trainer", "callback", "message"),
    [
        (
            old.Trainer,
            lightning_twa.TWACallback,
            "This TWACallback is of the package lightning.pytorch, but the Trainer is of "
            "pytorch_lightning. Use one of them throughout: from lightning_twa.pytorch_lightning "
            "import TWACallback.",
        ),
        (
            L.Trainer,
            OldTWACallback,
            "This TWACallback is of the package pytorch_lightning, but the Trainer is of "
            "lightning.pytorch. Use one of them throughout: from lightning_twa import TWACallback.",
        ),
    ],
)
def test_mixing_them_is_a_clear_error(tmp_path, trainer, callback, message) -> None:
    package = old if trainer is old.Trainer else L
    # Lightning 2.5 says "Expected a parent", before this package is asked
    with pytest.raises(ValueError, match=f"^({re.escape(message)}|Expected a parent)$"):
        trainer(
            accelerator="cpu",
            max_epochs=6,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback(4)],
        ).fit(make_module(package), loader())


MESSAGES = """
import logging, sys
import pytorch_lightning as pl  # before anything of this package
import lightning_twa
from lightning_twa.pytorch_lightning import TWACallback
from helpers.common import loader
from test_packages_of_lightning import make_module

seen = []
handler = logging.Handler()
handler.emit = lambda record: seen.append((record.name, record.getMessage()))
for name in ("lightning", "pytorch_lightning"):
    logging.getLogger(name).addHandler(handler)
twa = TWACallback(2, heldout=None)
pl.Trainer(
    accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[twa],
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
).fit(make_module(pl), loader())
names = {name for name, text in seen if text.startswith("TWA")}
everything = {name.partition(".")[0] for name, _ in seen}
print(names, everything)
"""


def test_messages_go_to_the_logger_of_the_package(tmp_path) -> None:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "subspace")])
    done = subprocess.run(
        [sys.executable, "-c", MESSAGES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = "{'pytorch_lightning.utilities.rank_zero'} {'pytorch_lightning'}"
    assert done.stdout.splitlines()[-1] == expected


def test_two_callbacks_in_a_trainer_are_refused(tmp_path) -> None:
    class Mine(lightning_twa.TWACallback):
        """Has a state of its own: Lightning itself refuses two of one class."""

    message = "The Trainer has 2 TWACallbacks, and each would put an average of its own into"
    twas = [lightning_twa.TWACallback(4), Mine(4)]
    with pytest.raises(ValueError, match=f"^{message}.*Keep one: averages of other widths are"):
        trainer(tmp_path, callbacks=twas).fit(make_module(L), loader(), loader(32, seed=1))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TWACallback`"):
        trainer(tmp_path, callbacks=[twas[0], lightning_twa.TWACallback(5)])
    assert "A Trainer takes one" in lightning_twa.TWACallback.__doc__
