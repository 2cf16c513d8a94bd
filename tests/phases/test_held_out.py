"""Which data averages are compared on, and what is read of that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helpers.common import Regressor, loader, regression_data, trainer, weights
from helpers.selection import POWER, fitted, make, mixed
from lightning_twa import CollectConfig, TWACallback
from lightning_twa.candidates import fitted_factors
from lightning_twa.phases.choose import fixed_averages
from lightning_twa.results import Result
from lightning_twa.trainer import batches_there, draw_batches
from lightning_twa.trainer.held_out import _order
from lightning_twa.trainer.replay import _frozen_kept

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to"),
    pytest.mark.filterwarnings("ignore:.*trains the averaging coefficients on the validation"),
]


# --- which data


@pytest.mark.parametrize(
    ("options", "held_out", "expected"),
    [
        ({}, loader(32), "the validation data"),
        ({"heldout": "val"}, loader(32), "the validation data"),
        ({"data": "val"}, loader(32), "a quarter of the validation data"),
        ({"heldout": None}, loader(32), None),
        ({}, None, None),
        ({}, [loader(32), loader(32)], None),
    ],
)
def test_the_data_that_it_is_measured_on(
    tmp_path: Path, options: dict[str, Any], held_out: Any, expected: str | None
) -> None:
    class Several(Regressor):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    twa = make(**options)
    fitted(tmp_path, twa, Several(), held_out=held_out)
    assert twa.result.heldout == expected
    if expected is None:
        assert (twa.result.start, twa.result.losses) == (None, {})
        assert "is not known" in str(twa.result)
    else:
        assert len(twa.result.path) == min(8, twa.result.steps)
        assert twa.result.measuring_seconds < twa.result.phase_seconds


def test_what_is_held_back_is_not_trained_on(tmp_path: Path) -> None:
    trained: set[float] = set()
    compared: set[float] = set()

    class Watching(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if twa.phase == "optimize":
                (trained if self.training else compared).update(batch[1].flatten().tolist())
            return super().training_step(batch, batch_idx)

    twa = make(data="val", start_epoch=2, collect=CollectConfig(start=0, power_averages=POWER))
    fitted(tmp_path, twa, Watching(), held_out=loader(128, 8, seed=1))
    assert len(trained) == 96
    assert len(compared) >= 8
    assert not trained & compared


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(regression_data(32, 1))


def test_data_that_cannot_be_divided_choose_nothing_and_the_log_says_so(
    tmp_path: Path, caplog: Any
) -> None:
    twa = make(data="val", start_epoch=None, phase_steps=4)
    with caplog.at_level("INFO"):
        held_out = DataLoader(Stream(), 16)
        trainer(tmp_path, callbacks=[twa], max_epochs=None, max_steps=24).fit(
            Regressor(), loader(), held_out
        )
    assert twa.result.heldout is None
    assert "cannot be divided" in caplog.text
    assert "nothing is chosen by held-out data" in caplog.text


def test_a_stream_of_validation_data_is_measured_on_its_first_batches(tmp_path: Path) -> None:
    twa = make()
    fitted(tmp_path, twa, held_out=DataLoader(Stream(), 16))
    assert twa.result.heldout == "the validation data"


class Picky(Regressor):
    """Cannot take a batch outside of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            raise RuntimeError("boxes are missing")
        return super().training_step(batch, batch_idx)


def test_a_step_that_cannot_take_held_out_batches(tmp_path: Path, caplog: Any) -> None:
    twa = make()
    with caplog.at_level("INFO"):
        fitted(tmp_path, twa, Picky())
    assert twa.phase == "done"
    assert twa.result.heldout is None
    assert "boxes are missing" in twa.result.reason
    assert "boxes are missing" in caplog.text
    with pytest.raises(ValueError, match=r"no loss for a batch of the validation data.*boxes are"):
        fitted(tmp_path, make(heldout="val"), Picky())


@pytest.mark.parametrize("heldout", ["val", "twa"])
def test_data_that_are_asked_for_and_not_there_are_an_error(tmp_path: Path, heldout: str) -> None:
    module = Regressor()
    with pytest.raises(ValueError, match=rf"heldout='{heldout}'\) compares .* Use heldout='auto'"):
        fitted(tmp_path, make(heldout=heldout), module, held_out=None)


def test_a_step_that_fails_in_the_phase_leaves_its_end(tmp_path: Path) -> None:
    class Late(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training and twa.phase == "optimize" and twa._run.optimization.steps > 3:
                raise RuntimeError("out of patience")
            return super().training_step(batch, batch_idx)

    twa = make()
    with pytest.warns(UserWarning, match=r"could not be measured in the phase.*out of patience"):
        module = fitted(tmp_path, twa, Late())
    assert twa.phase == "done"
    torch.testing.assert_close(weights(module).double(), mixed(twa), rtol=1e-5, atol=1e-6)


# --- what is read of it


def test_the_losses_are_logged_under_plain_names(tmp_path: Path) -> None:
    twa = make()
    logger = CSVLogger(tmp_path)
    fitted(tmp_path, twa, logger=logger, log_every_n_steps=1)
    metrics = logger.experiment.metrics_keys
    found = {key.removeprefix("twa/heldout/") for key in metrics if "heldout" in key}
    assert {"last_weights", "uniform", "last_2", "power_0.05", "mean", "path"} <= found


def test_the_result_travels_in_the_checkpoint_and_prints_a_table(tmp_path: Path) -> None:
    twa = make(save_average=str(tmp_path / "twa.ckpt"))
    fitted(tmp_path, twa)
    text = str(twa.result)
    assert text.startswith("loss on the validation data, ")
    assert "chosen" in text
    assert "result" in text
    state = torch.load(tmp_path / "twa.ckpt", weights_only=True)["callbacks"]["TWACallback"]
    again = make()
    again._run.load(None, state)
    assert again.result.losses == twa.result.losses
    assert str(again.result) == text
    with pytest.raises(AttributeError):
        twa.result.start = "x"  # type: ignore[misc]


@pytest.mark.parametrize("bad", ["train", "test", True, 1])
def test_other_held_out_data_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="Invalid heldout="):
        TWACallback(heldout=bad)


# --- nothing of it shows in training


def shuffles(tmp_path: Path, seed: int, heldout: Any) -> list[float]:
    """What training draws after a held-out step that fails."""

    class Drawing(Picky):
        drawn: list[float]

        def on_train_batch_end(self, *args: Any) -> None:
            self.drawn.append(float(torch.rand(())))

    L.seed_everything(seed, verbose=False)
    module = Drawing()
    module.drawn = []
    fitted(tmp_path, make(heldout=heldout), module)
    return module.drawn


def test_a_step_that_fails_leaves_the_random_state(tmp_path: Path) -> None:
    one, two = (shuffles(tmp_path, seed, "auto") for seed in (1, 2))
    assert not set(one) & set(two)
    assert one == shuffles(tmp_path, 1, None)


class Momentum(Regressor):
    """A step of it moves weights that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = torch.nn.Linear(6, 1).requires_grad_(False)
        torch.nn.init.zeros_(self.slow.weight)
        self.moved: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.slow.weight.add_(1.0)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.moved.append(float(self.slow.weight[0, 0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05)


def test_a_momentum_encoder_moves_in_training_alone(tmp_path: Path) -> None:
    module = Momentum()
    fitted(tmp_path, make(), module)
    assert module.moved[:16] == [float(step) for step in range(1, 17)]  # until the phase


class Every(torch.utils.data.SequentialSampler):
    """A part of the data: the others are trained on."""

    def __iter__(self) -> Any:
        return iter(range(0, 16))

    def __len__(self) -> int:
        return 16


@pytest.mark.parametrize("kind", ["derived", "wrapped", "subset"])
def test_samples_that_a_sampler_leaves_out_are_not_looked_at(kind: str) -> None:
    data = regression_data(64, 1)
    sampler: Any = Every(data)
    if kind == "subset":
        sampler = torch.utils.data.SubsetRandomSampler(range(16))
    if kind == "wrapped":
        sampler = DistributedSamplerWrapper(sampler, num_replicas=1, rank=0, shuffle=False)
    drawn = draw_batches(DataLoader(data, 4, sampler=sampler), 4, 0, 1)
    seen = {float(y) for _, targets in drawn for y in targets}
    assert len(drawn) == 4
    assert seen == {float(data[i][1]) for i in range(16)}


@pytest.mark.parametrize(
    ("n", "batch", "sizes"),
    [(17, 4, [4] * 4), (64, 64, [32, 32]), (80, 50, [27, 27, 26]), (9, 64, [9]), (1, 4, [1])],
)
def test_batches_count_alike_and_none_is_of_one_sample(
    n: int, batch: int, sizes: list[int]
) -> None:
    drawn = draw_batches(DataLoader(regression_data(n), batch), 10, 0, 1)
    assert [len(x) for x, _ in drawn] == sizes


@pytest.mark.parametrize(
    ("n", "batch", "at_most", "drawn", "there"),
    [(64, 8, 2, 2, 8), (64, 64, 1, 2, 2), (1000, 50, 1, 2, 40), (17, 4, 9, 4, 4), (3, 4, 1, 1, 1)],
)
def test_how_many_such_batches_there_are(
    n: int, batch: int, at_most: int, drawn: int, there: int
) -> None:
    data = DataLoader(regression_data(n), batch)
    assert len(draw_batches(data, at_most, 0, 1)) == drawn
    assert batches_there(data, at_most, 1) == there


def test_a_loader_of_the_users_own_sampler_says_so_itself_or_not() -> None:
    data = regression_data(64)
    own = DataLoader(data, 4, sampler=torch.utils.data.SubsetRandomSampler(range(16)))
    assert batches_there(own, 2, 1) == 4
    assert batches_there(iter([]), 2, 1) is None


@pytest.mark.parametrize(("size", "extent"), [(640, r"\d+ of \d+ batches"), (16, "1 batch")])
def test_the_table_says_of_how_many(tmp_path: Path, size: int, extent: str) -> None:
    twa = make()
    fitted(tmp_path, twa, held_out=loader(size, 16, seed=1))
    first = str(twa.result).splitlines()[0]
    assert re.fullmatch(f"loss on the validation data, {extent}:", first), first
    assert Result.from_state(twa.result.state_dict()).extent == twa.result.extent


def test_a_generator_that_is_shared_with_training_is_as_before() -> None:
    generator = torch.Generator().manual_seed(5)
    sampler = torch.utils.data.SubsetRandomSampler(range(16), generator=generator)
    before = generator.get_state()
    draw_batches(DataLoader(regression_data(32), 4, sampler=sampler), 2, 0, 1)
    assert torch.equal(generator.get_state(), before)


def test_a_phase_that_goes_on_with_other_batches_compares_no_more(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=1)
    held_out = loader(128, 16, seed=1)
    trainer(tmp_path, callbacks=[make(), saver], enable_checkpointing=True).fit(
        Regressor(), loader(), held_out
    )
    (path,) = (tmp_path / "ck").glob("*step=20.ckpt")
    twa, module = make(), Regressor()
    with pytest.warns(UserWarning, match=r"held-out batches, but there are \d now"):
        trainer(tmp_path, callbacks=[twa]).fit(
            module, loader(), loader(64, 64, seed=1), ckpt_path=path
        )
    assert twa.phase == "done"
    assert max(twa.result.path) <= 4
    torch.testing.assert_close(weights(module).double(), mixed(twa), rtol=1e-5, atol=1e-6)


def test_another_default_device_changes_nothing() -> None:
    names, data = ["power(0.13)", "mean", "epoch=1", "epoch=2", "epoch=3"], regression_data(16)
    factors = fitted_factors(names, 0.2)
    order = [x.tolist() for x, _ in draw_batches(DataLoader(data, 4), 2, 0, 1)]
    torch.set_default_device("meta")
    try:
        assert fitted_factors(names, 0.2) == factors
        averages = fixed_averages(names, names[:2], soup=False)
        assert all(w.device.type == "cpu" for w in averages.values())
        assert _order(16) == _order(16)
    finally:
        torch.set_default_device(None)
    assert [x.tolist() for x, _ in draw_batches(DataLoader(data, 4), 2, 0, 1)] == order


def test_a_large_frozen_backbone_is_not_copied() -> None:
    class Tuned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(100, 100).requires_grad_(False)
            self.head = torch.nn.Linear(2, 2)

    module = Tuned()
    before = module.backbone.weight.clone()
    with _frozen_kept(module), torch.no_grad():
        module.backbone.weight.add_(1.0)
    assert torch.equal(module.backbone.weight, before + 1)
    module.backbone = torch.nn.Linear(2, 2).requires_grad_(False)
    before = module.backbone.weight.clone()
    with _frozen_kept(module), torch.no_grad():
        module.backbone.weight.add_(1.0)
    assert torch.equal(module.backbone.weight, before)
