"""The average is in the model for a validation, and the weights are back after it."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from helpers.common import Recorder, Regressor, loader, trainer, weights
from helpers.modules import Fails
from lightning_twa import CollectConfig, TWACallback


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
