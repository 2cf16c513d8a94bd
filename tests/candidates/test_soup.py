"""Files as candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, run
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


@pytest.fixture(scope="module")
def soup(tmp_path_factory) -> tuple[Path, list[Regressor]]:
    """Three runs from one start, as Lightning checkpoints, state dicts and safetensors."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("soup")
    start, models = Regressor(batchnorm=True), []
    for i, name in enumerate(["a.ckpt", "b.pt", "c.safetensors"]):
        module = Regressor(batchnorm=True, lr=0.01 * (i + 1))
        module.load_state_dict(start.state_dict())
        the_trainer = trainer(folder, max_epochs=2)
        the_trainer.fit(module, loader(seed=i))
        if i == 0:
            the_trainer.save_checkpoint(folder / name)
        elif i == 1:
            torch.save(module.state_dict(), folder / name)
        else:
            save_file(module.state_dict(), folder / name)
        models.append(module)
    return folder, models


def is_mixed(module: Any, beta: Tensor, models: list[Any]) -> None:
    mixed = sum(float(b) * weights(m) for b, m in zip(beta[:, 0], models, strict=True))
    torch.testing.assert_close(weights(module), mixed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parametrization", ["free", "simplex", "mask"])
@pytest.mark.parametrize("data", ["train", "val"])
@pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")
def test_a_soup_of_files(tmp_path, soup, data, parametrization) -> None:
    folder, models = soup
    paths = [folder / name for name in ("a.ckpt", "b.pt", "c.safetensors")]
    twa = TWACallback(
        0,
        data=data,
        collect=CollectConfig(checkpoints=paths),
        subspace=SubspaceConfig(parametrization=parametrization),
    )
    module, recorder = Regressor(batchnorm=True), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder], max_epochs=2).fit(module, loader(), loader(32))
    assert {phase for phase, _ in recorder.steps} <= {"optimize", "done"}
    assert twa.candidate_names == ["a", "b", "c"]
    beta = twa.averaging_weights
    assert float(beta.sum()) == pytest.approx(1)
    is_mixed(module, beta, models)
    if parametrization == "mask":
        assert sorted(beta.flatten().tolist()) == [0, 0.5, 0.5]
        kept = [m for b, m in zip(beta[:, 0], models, strict=True) if b > 0]
        for parameters in zip(module.parameters(), *(m.parameters() for m in kept), strict=True):
            own, *others = [p.detach() for p in parameters]
            assert torch.equal(own, torch.stack(others).double().mean(0).float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_candidates_of_a_finished_run(tmp_path, dtype) -> None:
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "c"), dtype=dtype)
    first = TWACallback(4, collect=CollectConfig(start=1), storage=storage)
    module = Regressor(batchnorm=True)
    module.net[0].requires_grad_(False)
    trainer(tmp_path, callbacks=[first]).fit(module, loader())
    collect = CollectConfig(checkpoints=tmp_path / "c" / "version_0")
    second = TWACallback(0, collect=collect)
    trainer(tmp_path, callbacks=[second], max_epochs=1).fit(Regressor(batchnorm=True), loader())
    assert second.candidate_names == first.candidate_names
    for mine, theirs in zip(second.candidates, first.candidates, strict=True):
        for name, tensor in mine.parameters.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, theirs.parameters[name].float())


def test_files_of_one_name_in_several_directories(tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"run_{i}").mkdir()
        torch.save(Regressor().state_dict(), tmp_path / f"run_{i}" / "last.pt")
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "c"))
    collect = CollectConfig(checkpoints=str(tmp_path / "run_*" / "last.pt"))
    twa = TWACallback(0, collect=collect, storage=storage)
    trainer(tmp_path, callbacks=[twa], max_epochs=1).fit(Regressor(), loader())
    assert twa.candidate_names == ["run_0-last", "run_1-last", "run_2-last"]
    assert len(list((tmp_path / "c").rglob("*.safetensors"))) == 3


def test_files_beside_snapshots(tmp_path, soup) -> None:
    folder, _ = soup
    collect = CollectConfig(checkpoints=str(folder / "*.pt"), start=1, max_candidates=2)
    twa = TWACallback(4, collect=collect)
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(batchnorm=True), loader())
    assert twa.candidate_names == ["b", "epoch=2", "epoch=3"]


def test_frozen_parameters_come_from_the_files(tmp_path) -> None:
    torch.manual_seed(5)
    trained = []
    backbone = Regressor()
    for i in range(3):
        module = Regressor()
        module.net[0].load_state_dict(backbone.net[0].state_dict())
        torch.save(module.state_dict(), tmp_path / f"{i}.pt")
        trained.append(module)
    module = Regressor()  # another backbone
    module.net[0].requires_grad_(False)

    twa = TWACallback(0, collect=CollectConfig(checkpoints=str(tmp_path / "*.pt")))
    trainer(tmp_path, callbacks=[twa], max_epochs=1).fit(module, loader())
    assert torch.equal(module.net[0].weight, backbone.net[0].weight)
    is_mixed(module, twa.averaging_weights, trained)


def test_a_soup_may_go_as_far_as_a_single_run(tmp_path, soup) -> None:
    class Budget(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.radius = twa._run.optimization.optimizer.radius

    folder, models = soup
    paths = [folder / name for name in ("a.ckpt", "b.pt", "c.safetensors")]
    for solver, radius in ((None, 2 * 3**0.5), (SolverConfig(radius=1.0), 1.0)):
        budget = Budget()
        twa = TWACallback(0, collect=CollectConfig(checkpoints=paths), solver=solver)
        trainer(tmp_path, callbacks=[twa, budget]).fit(Regressor(batchnorm=True), loader())
        assert twa.num_candidates == len(models)
        assert budget.radius == radius


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_soup_resumes(tmp_path, soup, storage) -> None:
    folder, _ = soup
    dirpath = str(tmp_path / "c") if storage == "disk" else None

    def make_twa() -> TWACallback:
        return TWACallback(
            0,
            collect=CollectConfig(checkpoints=str(folder / "*.*")),
            storage=StorageConfig(kind=storage, dirpath=dirpath),
        )

    def make_module() -> Regressor:
        return Regressor(batchnorm=True)

    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, every_n_train_steps=3)
    whole = run(tmp_path, make_module, make_twa, saver=saver, max_epochs=3)
    for path in sorted((tmp_path / "ck").glob("*=*.ckpt")):
        again = run(tmp_path, make_module, make_twa, path, max_epochs=3)
        assert differences(whole, again) == []


@pytest.mark.parametrize(
    ("names", "start", "extra", "message"),
    [
        (["a.ckpt"], 0, {}, "CollectConfig.checkpoints names 1 file"),
        (["nothing*.pt"], 0, {}, "nothing"),
        (["a.ckpt", "b.pt"], 0, {"ema_decays": (0.9,)}, "needs epochs to collect in"),
        (["a.ckpt", "b.pt"], 0, {"start": 0}, "must be below start_epoch=0"),
    ],
)
def test_bad_files_are_found_before_training(tmp_path, soup, names, start, extra, message) -> None:
    paths = [soup[0] / name for name in names]
    twa = TWACallback(start, collect=CollectConfig(checkpoints=paths, **extra))
    module = Regressor(batchnorm=True)
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callbacks=[twa]).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_files_of_another_model_are_found_before_training(tmp_path, soup) -> None:
    twa = TWACallback(0, collect=CollectConfig(checkpoints=str(soup[0] / "*.pt*")), data="train")
    twa = TWACallback(4, collect=CollectConfig(checkpoints=str(soup[0] / "*.pt")))
    module = Regressor()
    recorder = Recorder(twa)
    with pytest.raises(ValueError, match=r"b\.pt"):
        trainer(tmp_path, callbacks=[twa, recorder]).fit(module, loader())
    assert recorder.steps == []


def test_a_mask_that_keeps_all_is_found_before_training(tmp_path, soup) -> None:
    twa = TWACallback(4, subspace=SubspaceConfig(parametrization="mask", mask_size=2))
    with pytest.raises(ValueError, match="mask_size=2 needs more than 2 candidates, but there wi"):
        trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_candidates_of_a_finished_run_have_other_names_than_those_of_this_run(
    tmp_path, kind
) -> None:
    first = TWACallback(
        4,
        collect=CollectConfig(start=1),
        storage=StorageConfig(kind="disk", dirpath=str(tmp_path / "c")),
    )
    trainer(tmp_path, callbacks=[first]).fit(Regressor(), loader())
    dirpath = str(tmp_path / "d") if kind == "disk" else None
    second = TWACallback(
        4,
        collect=CollectConfig(start=1, checkpoints=str(tmp_path / "c" / "version_0")),
        storage=StorageConfig(kind=kind, dirpath=dirpath),
    )
    trainer(tmp_path, callbacks=[second]).fit(Regressor(), loader())
    own = [f"epoch={e}" for e in (1, 2, 3)]
    assert second.candidate_names == [f"version_0-{name}" for name in own] + own
    old = {c.name: c for c in first.candidates}
    new = {c.name: c for c in second.candidates}
    for name in own:
        a, b = old[name].parameters, new[f"version_0-{name}"].parameters
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not torch.equal(new[name].parameters["net.0.weight"], a["net.0.weight"])


def test_a_run_that_has_files_under_their_own_names_does_not_take_them_again(tmp_path) -> None:
    """As version 0.1.0 named them."""
    folder = tmp_path / "c"
    first = TWACallback(
        4, collect=CollectConfig(start=1), storage=StorageConfig(kind="disk", dirpath=str(folder))
    )
    trainer(tmp_path, callbacks=[first]).fit(Regressor(), loader())
    collect = CollectConfig(start=4, checkpoints=str(folder / "version_0"))
    second, saver = TWACallback(6, collect=collect), ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer(tmp_path, callbacks=[second, saver], max_epochs=8, enable_checkpointing=True).fit(
        Regressor(), loader()
    )
    path = tmp_path / "epoch=4-step=20.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["TWACallback"]
    for entry in state["candidates"]["given"]:
        entry["name"] = entry["name"].removeprefix("version_0-")
    state["candidate_names"] = [n.removeprefix("version_0-") for n in state["candidate_names"]]
    torch.save(checkpoint, path)
    third = TWACallback(6, collect=collect)
    trainer(tmp_path, callbacks=[third], max_epochs=8).fit(Regressor(), loader(), ckpt_path=path)
    assert third.candidate_names == [f"epoch={e}" for e in (1, 2, 3, 4, 5)]
