"""Running averages and files as candidates."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.ddp import fit, strided
from helpers.resume import differences, equal, run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_twa import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig, TWACallback
from lightning_twa.candidates import RunningAverages

DECAYS = (0.5, 0.9, 0.99)
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


def reference_average(history: list[Tensor], decay: float) -> Tensor:
    """``sum_s d^(t-s) w_s / sum_s d^(t-s)`` in float64."""
    factors = [decay ** (len(history) - 1 - s) for s in range(len(history))]
    return sum(f * w.double() for f, w in zip(factors, history, strict=True)) / sum(factors)


# --- running averages


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_an_average_is_the_weighted_mean_of_what_it_has_seen(updates) -> None:
    module = Regressor()
    averages = RunningAverages(DECAYS)
    history = []
    for _ in range(updates):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        averages.update(module)
        history.append(weights(module))
    for i, decay in enumerate(DECAYS):
        flat = torch.cat([t.double().reshape(-1) for t in averages.weights(i).values()])
        torch.testing.assert_close(flat, reference_average(history, decay), rtol=1e-5, atol=1e-5)


def test_frozen_parameters_have_no_average_and_low_precision_is_averaged_in_float32() -> None:
    module = Regressor().bfloat16()
    module.net[0].requires_grad_(False)
    averages = RunningAverages((0.999,))
    history = []
    for _ in range(200):
        averages.update(module)
        history.append(module.net[2].bias.detach().clone())
        with torch.no_grad():
            module.net[2].bias.add_(0.01)
    (found,) = [averages.weights(0)["net.2.bias"]]
    assert set(averages.weights(0)) == {"net.2.weight", "net.2.bias"}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference_average(history, 0.999))


def test_a_parameter_that_becomes_trainable_starts_with_its_value() -> None:
    module = Regressor()
    module.net[0].requires_grad_(False)
    averages = RunningAverages((0.9,))
    averages.update(module)
    module.net[0].requires_grad_(True)
    averages.update(module)
    assert torch.equal(averages.weights(0)["net.0.weight"], module.net[0].weight)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_averages_are_candidates(tmp_path, accumulate, storage) -> None:
    dirpath = str(tmp_path / "c") if storage == "disk" else None
    twa = TWACallback(
        4,
        collect=CollectConfig(start=2, max_candidates=2, ema_decays=DECAYS),
        storage=StorageConfig(kind=storage, dirpath=dirpath),
    )
    module, recorder = Regressor(batchnorm=True), Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder], accumulate_grad_batches=accumulate).fit(
        module, loader()
    )
    averages = [f"ema({decay})" for decay in DECAYS]
    assert twa.candidate_names == [*averages, "epoch=2", "epoch=3"]
    assert twa.averaging_weights.shape == (5, 1)
    window = [w for phase, w in recorder.steps if phase == "collect"][8:16][
        accumulate - 1 :: accumulate
    ]
    assert len(window) == 8 // accumulate
    candidates = {c.name: c.parameters for c in twa._run.store}
    for decay in DECAYS:
        flat = torch.cat([t.double().reshape(-1) for t in candidates[f"ema({decay})"].values()])
        expected = reference_average(window, decay)
        torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-6)
    mixed = sum(
        float(b) * torch.cat([t.double().reshape(-1) for t in c.values()])
        for b, c in zip(twa.averaging_weights[:, 0], candidates.values(), strict=True)
    )
    torch.testing.assert_close(weights(module), mixed, rtol=1e-5, atol=1e-5)


def test_running_averages_alone_are_enough(tmp_path) -> None:
    collect = CollectConfig(start=1, every_n_epochs=99, ema_decays=DECAYS)
    twa = TWACallback(4, collect=collect)
    trainer(tmp_path, callbacks=[twa]).fit(Regressor(), loader())
    assert twa.phase == "done"
    assert twa.candidate_names == [f"ema({decay})" for decay in DECAYS]


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_resumed_run_has_the_same_running_averages(tmp_path, every, storage) -> None:
    dirpath = str(tmp_path / "c") if storage == "disk" else None

    def make_twa() -> TWACallback:
        return TWACallback(
            4,
            collect=CollectConfig(start=1, ema_decays=DECAYS),
            storage=StorageConfig(kind=storage, dirpath=dirpath),
        )

    when = {"every_n_train_steps": 1} if every == "step" else {"every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path / "ck", save_top_k=-1, **when)
    whole = run(tmp_path, Regressor, make_twa, saver=saver)
    paths = sorted((tmp_path / "ck").glob("*.ckpt"))
    assert len(paths) == (24 if every == "step" else 6)
    for path in paths:
        assert differences(whole, run(tmp_path, Regressor, make_twa, path)) == []


def test_other_decays_on_resuming(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)

    def twa(*decays: float) -> Callable[[], TWACallback]:
        return lambda: TWACallback(4, collect=CollectConfig(start=1, ema_decays=decays))

    run(tmp_path, Regressor, twa(0.9), saver=saver)
    with pytest.raises(ValueError, match=r"ema_decays=\(0.9,\), but this callback has \(0.5,\)"):
        run(tmp_path, Regressor, twa(0.5), tmp_path / "ck" / "epoch=2.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
def test_two_processes_have_the_same_running_averages(tmp_path) -> None:
    collect = CollectConfig(start=1, ema_decays=DECAYS)
    ends, module = {}, Regressor()
    for processes in (1, 2):
        ends[processes] = fit(
            tmp_path / str(processes),
            TWACallback(4, collect=collect),
            deepcopy(module),
            processes,
            train=strided(processes),
            use_distributed_sampler=False,
        )
    (one,), (two, other) = ends[1], ends[2]
    assert two["candidate_names"] == one["candidate_names"]
    assert torch.equal(two["averaging_weights"], other["averaging_weights"])
    for mine, theirs in zip(one["candidates"], two["candidates"], strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decays": (0.9, 1.0)}, r"ema_decays=\(0.9, 1.0\). Must be different numbers"),
        ({"ema_decays": 0.9}, "ema_decays=0.9. Must be"),
        ({"ema_decays": (0.9, 0.9)}, "Must be different numbers"),
        ({"ema_decays": (0.9,), "ema_device": "nowhere"}, "ema_device='nowhere'"),
        ({"ema_device": "cpu"}, "ema_device='cpu' needs ema_decays"),
    ],
)
def test_bad_running_averages(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CollectConfig(**arguments)


# --- files


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
            self.radius = trainer.optimizers[0].radius

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
    for path in sorted((tmp_path / "ck").glob("*.ckpt")):
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


# --- steps that see other weights


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
    for path in sorted((tmp_path / "ck").glob("*.ckpt")):
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
