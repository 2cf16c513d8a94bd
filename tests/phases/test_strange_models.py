"""Models that nobody thought of: layers and parameters of other forms, and those that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.common import Regressor
from helpers.recipes import KINDS, run, twa
from helpers.resume import equal, state
from lightning_twa import StorageConfig


class Freezes(Regressor):
    """For each validation, all or a part of it."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part

    def on_validation_start(self) -> None:
        (self.net[0] if self.part else self).requires_grad_(False)

    def on_validation_end(self) -> None:
        self.requires_grad_(True)


@pytest.mark.parametrize("part", [True, False])
def test_a_module_that_freezes_itself_for_validation(tmp_path, part) -> None:
    callback, module = twa("validated"), Freezes(part)
    run(tmp_path, callback, module)
    assert equal(callback.average_state_dict(), state(module))


# --- parameters


class MakesAnew(Regressor):
    """Replaces a parameter in an epoch, and tells the optimizer."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == self.epoch:
            old = self.net[0].weight
            self.net[0].weight = nn.Parameter(old.detach().clone())
            for optimizer in self.trainer.optimizers:
                optimizer.state.pop(old, None)
                for group in optimizer.param_groups:
                    group["params"] = [
                        self.net[0].weight if p is old else p for p in group["params"]
                    ]


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_parameter_that_is_made_anew(tmp_path, epoch) -> None:
    """In the phase nothing would train it: the run ends with the uniform average, and says why."""
    callback, module = twa(), MakesAnew(epoch)
    if epoch < 3:
        run(tmp_path, callback, module)
    else:
        with pytest.warns(UserWarning, match=r"step \d+ .*'net.0.weight' is another tensor than"):
            run(tmp_path, callback, module)
    weights = callback.averaging_weights[:, 0]
    assert torch.equal(weights, torch.full_like(weights, 1 / 3)) is (epoch > 3)
    assert equal(callback.average_state_dict(), state(module))
    for name, value in state(module).items():
        held = [c.parameters[name].double() for c in callback._run.store]
        mixed = sum(float(w) * h for w, h in zip(weights, held, strict=True))
        torch.testing.assert_close(value.double(), mixed, rtol=1e-5, atol=1e-6)


FROZEN = {
    "expanded": lambda: torch.ones(1).expand(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "empty": lambda: torch.ones(0),
    "int": lambda: torch.arange(3),
}


@pytest.mark.matrix(16)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FROZEN)
def test_a_frozen_parameter_of_any_form(tmp_path, form, kind, storage) -> None:
    module = Regressor()
    module.odd = nn.Parameter(FROZEN[form](), requires_grad=False)
    before = module.odd.detach().clone()
    callback = twa(kind, storage=StorageConfig(kind=storage))
    run(tmp_path, callback, module, enable_checkpointing=False)
    assert callback.phase == "done"
    assert torch.equal(module.odd.to_dense(), before.to_dense())


def test_a_sparse_parameter_that_is_trained_is_refused(tmp_path) -> None:
    module = Regressor()
    module.odd = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"cannot average 'odd', .*layout torch.sparse_coo"):
        run(tmp_path, twa(), module)


class Lazy(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyLinear(8)
        self.example = torch.zeros(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_the_first_batch_shapes(tmp_path, kind) -> None:
    callback, module = twa(kind), Lazy()
    run(tmp_path, callback, module, num_sanity_val_steps=0)
    assert equal(callback.average_state_dict(), state(module))


def test_a_layer_that_no_batch_has_shaped_is_named(tmp_path) -> None:
    module = Lazy()
    module.unused = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"'unused.weight', has no values: .*lazy"):
        run(tmp_path, twa(), module)
