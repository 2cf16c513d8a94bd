"""The state of the user's optimizer in main memory while it rests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import StorageConfig
from lightning_twa.trainer import resting
from lightning_twa.trainer.resting import RestingState

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.fixture
def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host counts as a device: what is moved lies elsewhere in it meanwhile."""
    monkeypatch.setattr(resting, "HOSTS", set())


def stepped(kind: Any = torch.optim.AdamW, **kwargs: Any) -> torch.optim.Optimizer:
    net = nn.Linear(4, 3)
    optimizer = kind(net.parameters(), lr=0.1, **kwargs)
    net(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


def of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"amsgrad": True}])
def test_tensors_stay_the_same_objects_with_the_same_bits(as_device: None, how: Any) -> None:
    optimizer, rest = stepped(**how), RestingState()
    before = [(t, t.clone(), t.data_ptr()) for t in of(optimizer)]
    assert rest.put_away([optimizer]) == 0
    for (tensor, values, place), now in zip(before, of(optimizer), strict=True):
        assert tensor is now
        assert torch.equal(tensor, values)
        assert (tensor.data_ptr() == place) == (tensor.dim() == 0), "numbers stay where they are"
    rest.put_away([optimizer])
    assert len(rest._moved) == sum(t.dim() > 0 for t, *_ in before)
    rest.bring_back()
    rest.bring_back()
    assert all(torch.equal(t, values) for t, values, _ in before)


class Own(Tensor):
    pass


def test_what_shares_memory_or_is_of_its_own_class_stays(as_device: None) -> None:
    optimizer, rest = stepped(torch.optim.SGD, momentum=0.9), RestingState()
    flat, whole = torch.randn(8), torch.randn(5)
    held = {"a": flat[:4], "b": flat[4:], "c": whole, "d": whole.view(5), "e": whole.view(1, 5)}
    own = torch.randn(6).as_subclass(Own)
    places = {key: tensor.data_ptr() for key, tensor in held.items()}
    optimizer.state[next(iter(optimizer.state))].update(held, own=own)
    assert rest.put_away([optimizer]) == own.nbytes
    assert {key: tensor.data_ptr() for key, tensor in held.items()} == places
    assert len(rest._moved) == 2


def test_a_state_that_was_loaded_meanwhile_is_moved_too(as_device: None) -> None:
    optimizer, rest = stepped(), RestingState()
    rest.put_away([optimizer])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest.put_away([optimizer])
    assert {id(t) for t, _ in rest._moved} == {id(t) for t in of(optimizer) if t.dim() > 0}


# --- in a run


class AdamW(Regressor):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Watch(L.Callback):
    """Saves in every epoch, and sees how much rests."""

    def __init__(self, folder: Path, twa: TWACallback) -> None:
        self.folder, self.twa, self.resting = folder, twa, []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        changes = self.twa._run.optimization.switch._changes
        rest = None if changes is None else changes._resting
        self.resting.append(0 if rest is None else len(rest._moved))
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def run(folder: Path, module: Any, offload: bool, ckpt: Any = None, **kwargs: Any) -> Any:
    L.seed_everything(2, verbose=False)
    storage = StorageConfig(offload_optimizer=offload)
    twa = TWACallback(
        **{"start_epoch": 4, "collect": CollectConfig(start=1), "storage": storage, **kwargs}
    )
    watch = Watch(folder, twa)
    the_trainer = trainer(folder, callbacks=[twa, watch], max_epochs=8)
    try:
        the_trainer.fit(module, loader(), loader(32, seed=1), ckpt_path=ckpt)
    finally:
        watch.optimizer = the_trainer.optimizers[0]
        watch.left = twa._run.optimization.switch._changes
    return watch


def saved(folder: Path, epoch: int) -> Any:
    return torch.load(folder / f"{epoch}.ckpt", weights_only=True)["optimizer_states"]


@pytest.mark.parametrize("cycles", [1, 2])
def test_a_run_and_its_checkpoints_are_the_same(
    tmp_path: Path, as_device: None, cycles: int
) -> None:
    module = AdamW()
    usual, offloaded = copy.deepcopy(module), copy.deepcopy(module)
    how = {"cycles": cycles, "start_epoch": 4 if cycles == 1 else 3}
    run(tmp_path / "a", usual, False, **how)
    watch = run(tmp_path / "b", offloaded, True, **how)
    assert equal(state(usual), state(offloaded))
    assert watch.left is None
    assert set(watch.resting) == {0, 8}, "two moments of four tensors"
    for epoch in range(8):
        assert equal(saved(tmp_path / "a", epoch), saved(tmp_path / "b", epoch))


@pytest.mark.parametrize("epoch", [3, 5])
def test_a_resumed_run_is_the_same(tmp_path: Path, as_device: None, epoch: int) -> None:
    module = AdamW()
    whole = copy.deepcopy(module)
    run(tmp_path / "a", whole, True)
    watch = run(tmp_path / "b", module, True, tmp_path / "a" / f"{epoch}.ckpt")
    assert equal(state(module), state(whole))
    assert set(watch.resting[-2:]) == {8}
    assert equal(saved(tmp_path / "a", 7), saved(tmp_path / "b", 7))


class Fails5(AdamW):
    def training_step(self, batch: Any, index: int) -> Any:
        if self.current_epoch == 5:
            raise RuntimeError("planned")
        return super().training_step(batch, index)


def test_an_exception_brings_the_state_back(
    tmp_path: Path, as_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = RestingState.bring_back

    def counted(rest: RestingState) -> None:
        calls.append(len(rest._moved))
        plain(rest)

    monkeypatch.setattr(RestingState, "bring_back", counted)
    with pytest.raises(RuntimeError, match="planned"):
        run(tmp_path, Fails5(), True)
    assert calls == [8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_freed(tmp_path: Path) -> None:
    optimizer = stepped()
    optimizer.load_state_dict(optimizer.state_dict())
    tensor = torch.randn(1000, 1000, device="cuda")
    values, before = tensor.cpu(), torch.cuda.memory_allocated()
    optimizer.state[next(iter(optimizer.state))]["large"] = tensor
    rest = RestingState()
    rest.put_away([optimizer])
    assert torch.cuda.memory_allocated() <= before - tensor.nbytes
    rest.bring_back()
    assert tensor.is_cuda
    assert torch.equal(tensor.cpu(), values)
