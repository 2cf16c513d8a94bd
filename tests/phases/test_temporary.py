"""The average is in the model for a validation, and the weights are back after it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.modules import Fails
from helpers.plain import CollectConfig, TWACallback
from lightning_twa.candidates import Store
from lightning_twa.phases.temporary import TemporaryAverage


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_the_average_is_validated_gives_the_weights_back(
    tmp_path, error
) -> None:
    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.validated = weights(pl_module)

    watch = Watch()
    twa = TWACallback(start_epoch=8, validate_average=True, collect=CollectConfig(start=0))
    recorder = Recorder(twa)
    module = Fails("validation", error)
    the_trainer = trainer(tmp_path, callbacks=[twa, recorder, watch], max_epochs=10)
    raised = SystemExit if error is KeyboardInterrupt else error
    with pytest.raises(raised):
        the_trainer.fit(module, loader(), loader(32, seed=1))
    average = (recorder.epochs[0] + recorder.epochs[1]) / 2
    torch.testing.assert_close(watch.validated, average, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights(module), recorder.steps[-1][1])


def test_validate_average_validates_it_and_restores_the_weights(tmp_path) -> None:
    class Watch(L.Callback):
        validated: torch.Tensor
        pairs: list[tuple[int, torch.Tensor, torch.Tensor]]

        def __init__(self) -> None:
            self.pairs = []

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.validated = weights(pl_module)

        def on_train_epoch_end(self, trainer, pl_module):
            self.pairs.append((trainer.current_epoch, self.validated, weights(pl_module)))

    watch = Watch()
    twa = TWACallback(start_epoch=4, validate_average=True, collect=CollectConfig(start=0))
    recorder = Recorder(twa)
    trainer(tmp_path, callbacks=[twa, recorder, watch]).fit(
        Regressor(), loader(), loader(32, seed=1)
    )
    for epoch, validated, after in watch.pairs:
        assert torch.equal(after, recorder.epochs[epoch])
        if 0 < epoch < 4:
            expected = torch.stack([recorder.epochs[e] for e in range(epoch)]).mean(0)
            torch.testing.assert_close(validated, expected, rtol=1e-6, atol=1e-7)


class Centered(Regressor):
    """Keeps buffers that training changes at every step: a mean, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("seen", torch.tensor(0))

    def training_step(self, batch, batch_idx):
        self.center += batch[0].mean(0)
        self.seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:TWA will not run", "ignore:TWA never ran")
def test_the_average_has_averaged_buffers_and_those_of_training_come_back(tmp_path) -> None:
    class Watch(L.Callback):
        def __init__(self) -> None:
            self.trained, self.validated = [], []

        def now(self, module):
            return module.center.clone(), int(module.seen)

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.trained.append(self.now(pl_module))

        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.validated.append(self.now(pl_module))

        def on_train_batch_start(self, trainer, pl_module, *args):
            if self.trained:
                center, seen = self.now(pl_module)
                assert torch.equal(center, self.trained[-1][0])
                assert seen == self.trained[-1][1]

    watch = Watch()
    twa = TWACallback(start_epoch=8, validate_average=True, collect=CollectConfig(start=0))
    trainer(
        tmp_path, callbacks=[twa, watch], max_epochs=9, max_steps=12, num_sanity_val_steps=0
    ).fit(Centered(), loader(), loader(16, seed=1))
    ends = watch.trained[3::4]
    (first, _), (one, seen_one), (both, seen_both) = watch.validated
    assert torch.equal(first, ends[0][0]), "no candidate yet"
    assert torch.equal(one, ends[0][0])
    assert torch.allclose(both, (ends[0][0] + ends[1][0]) / 2)
    assert (seen_one, seen_both) == (ends[0][1], ends[1][1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.momentum, self.head = (nn.Linear(3, 3) for _ in range(3))
        self.backbone.requires_grad_(False)
        self.momentum.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))


def test_what_is_frozen_is_neither_copied_nor_written() -> None:
    """Unless it changes all the same, as a momentum encoder does."""
    net, store, temporary = Encoder(), Store(), TemporaryAverage()
    for step in range(3):
        for parameter in (*net.momentum.parameters(), *net.head.parameters()):
            parameter.data.normal_()
        net.count.fill_(step)
        store.add(net, f"step={step}")
    for parameter in net.momentum.parameters():
        parameter.data.normal_()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    versions = {name: p._version for name, p in net.named_parameters()}
    temporary.put_in(net, store, lambda: None)
    assert set(temporary._raw) == {
        *(f"{part}.{what}" for part in ("momentum", "head") for what in ("weight", "bias")),
        "count",
    }
    members = [candidate.tensors for candidate in store]
    for name, tensor in net.state_dict().items():
        expected = torch.stack([member[name].double() for member in members]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    temporary.take_out(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    now = {name: p._version for name, p in net.named_parameters()}
    assert {n.partition(".")[0] for n in now if now[n] == versions[n]} == {"backbone"}
