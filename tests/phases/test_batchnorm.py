"""BatchNorm statistics, re-estimated for the average."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import update_bn

from helpers.common import loader, trainer
from helpers.modules import Augmented
from helpers.resume import equal
from helpers.runs import DATA
from lightning_twa import TWACallback
from lightning_twa.phases.batchnorm import reestimate, tracked_batch_norms


def norms() -> tuple[nn.Sequential, list[torch.Tensor]]:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5))
    batches = [2 * torch.randn(16, 3) + 1 for _ in range(6)]
    for batch in batches:
        net(batch)
    return net, batches


def forward(net: nn.Module, batches: list[torch.Tensor]) -> int:
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return len(batches)


def test_statistics_equal_torch_s_update_bn_and_a_float64_mean() -> None:
    net, batches = norms()
    layers = tracked_batch_norms(net, set(net.modules()))
    assert reestimate(layers, lambda: forward(net, batches)) == 6
    found = [layer.running_mean.clone() for layer in layers]
    hidden = torch.stack([net[0](b).detach().double() for b in batches])
    torch.testing.assert_close(found[0].double(), hidden.mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layers[0].running_var.double(), hidden.var(dim=1).mean(0), rtol=1e-5, atol=1e-6
    )
    assert [layer.momentum for layer in layers] == [0.3, 0.1]
    update_bn(batches, net)
    for mean, layer in zip(found, layers, strict=True):
        assert torch.equal(mean, layer.running_mean)


def test_without_batches_or_after_an_error_the_statistics_are_as_before() -> None:
    net, _ = norms()
    layers = tracked_batch_norms(net, set(net.modules()))
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def fail() -> int:
        net(torch.randn(16, 3))
        raise RuntimeError("planned")

    assert reestimate(layers, lambda: 0) == 0
    with pytest.raises(RuntimeError, match="planned"):
        reestimate(layers, fail)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [layer.momentum for layer in layers] == [0.3, 0.1]


def test_only_layers_that_training_updates_are_taken() -> None:
    net, _ = norms()
    net.append(nn.BatchNorm1d(5, track_running_stats=False))
    net[2].eval()
    training = {m for m in net.modules() if m.training}
    assert tracked_batch_norms(net, training) == [net[1]]


@DATA
@pytest.mark.parametrize("validate_average", [False, True])
def test_batchnorm_is_reestimated_over_the_training_data_before_the_last_validation(
    tmp_path, data, validate_average
) -> None:
    twa = TWACallback(start_epoch=4, data=data, validate_average=validate_average)
    module = Augmented()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, monitor="val_loss")
    the_trainer = trainer(
        tmp_path, callbacks=[twa, checkpoint], enable_checkpointing=True, val_check_interval=2
    )
    the_trainer.fit(module, loader(), loader(32, seed=1))
    norm = module.net[1]
    inputs = [module.net[0](module.frozen_norm(x)).double().detach() for x, _ in loader()]
    mean = torch.stack([b.mean(0) for b in inputs]).mean(0)
    var = torch.stack([b.var(0) for b in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.val_stats[0], norm.running_mean), "the last validation saw others"
    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked) == 4
    assert torch.equal(module.frozen_norm.running_mean, torch.zeros(6)), "kept in evaluation mode"
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert equal(saved, dict(module.state_dict()))
