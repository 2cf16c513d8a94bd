"""Fine-tuning with most parameters frozen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.common import Frozen, Regressor, loader, mse, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, equal, ordered, run, state
from helpers.runs import fit
from lightning_twa import StorageConfig, SubspaceConfig, average
from lightning_twa.candidates import Store, leave_out_frozen

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


class Head(Regressor):
    """A small head on a large frozen backbone, which may be trained from some epoch on."""

    def __init__(self, unfreeze: int = 99, assign: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 2000), nn.Linear(2000, 6)).requires_grad_(False)
        self.unfreeze, self.assign = unfreeze, assign

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch >= self.unfreeze)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state_dict, strict=True, assign=self.assign)


def memory(start_epoch: int = 4) -> TWACallback:
    storage = StorageConfig(kind="memory")
    return TWACallback(start_epoch, collect=CollectConfig(start=1), storage=storage)


def test_a_checkpoint_holds_what_is_frozen_once(tmp_path) -> None:
    def sizes(folder: Path, *callbacks: L.Callback) -> list[int]:
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        trainer(folder, callbacks=[*callbacks, saver], enable_checkpointing=True).fit(
            Head(), loader()
        )
        return [p.stat().st_size for p in sorted(folder.glob("*=*.ckpt"))]

    frozen = sum(p.nbytes for p in Head().backbone.parameters())
    plain, with_twa = sizes(tmp_path / "plain"), sizes(tmp_path / "twa", memory())
    assert frozen < min(plain) < 2 * frozen
    more = [b - a for a, b in zip(plain, with_twa, strict=True)]
    assert 0 < max(more) < frozen / 2
    state = torch.load(tmp_path / "twa" / "epoch=2.ckpt", weights_only=True)
    entry = state["callbacks"]["TWACallback"]["candidates"]["window"][0]
    assert set(entry["parameters"]) == {n for n, _ in Head().named_parameters() if "net" in n}
    assert set(entry["as_in_module"]) == {n for n, _ in Head().named_parameters() if "back" in n}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("unfreeze", [99, 3])
def test_what_is_frozen_resumes(tmp_path, unfreeze, assign) -> None:
    def make() -> Head:
        return Head(unfreeze, assign)

    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)
    whole = run(tmp_path, make, memory, saver=saver)
    for path in sorted((tmp_path / "ck").glob("*=*.ckpt")):
        assert differences(whole, run(tmp_path, make, memory, path)) == [], path.name


class Finetuned(Head):
    """Its optimizer gets the backbone when a callback unfreezes it."""

    resumed_behind_it = False

    def setup(self, stage: str) -> None:
        if self.resumed_behind_it:
            self.backbone.requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        pass

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, 0.05, momentum=0.9)


def finetune(folder: Path, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    """What a run ends with whose backbone is unfrozen at epoch 2, and whose phase starts at 4."""
    L.seed_everything(1 if ckpt_path is None else 99, verbose=False)
    module, saver = Finetuned(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    backbone = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)
    callbacks = [memory(), backbone, saver] if ckpt_path is None else [memory(), backbone]
    trainer(folder, callbacks=callbacks, enable_checkpointing=ckpt_path is None).fit(
        module, ordered(), ckpt_path=ckpt_path
    )
    return state(module)


def test_backbone_finetuning_resumes(tmp_path) -> None:
    whole = finetune(tmp_path / "whole")
    for epoch in (1, 4):  # before the unfreezing, and in the phase
        resumed = finetune(tmp_path / f"{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert equal(whole, resumed), epoch


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_backbone_that_lightning_leaves_frozen_is_a_warning(tmp_path, epoch) -> None:
    finetune(tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"frozen now \(4, the first is 'backbone.0.weight'\)"):
        finetune(tmp_path / "resumed", tmp_path / "whole" / f"epoch={epoch}.ckpt")


def test_what_the_warning_advises_works(tmp_path, monkeypatch) -> None:
    whole = finetune(tmp_path / "whole")
    monkeypatch.setattr(Finetuned, "resumed_behind_it", True)
    for epoch in (2, 3):
        resumed = finetune(tmp_path / f"{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert equal(whole, resumed), epoch


class AdaptersOnly(Head):
    """Keeps the backbone, which it can load from elsewhere, out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.backbone.parameters():
                parameter.normal_(0, 0.02, generator=generator)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if "backbone" in name]:
            del checkpoint["state_dict"][name]

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.load_state_dict(self, state_dict, strict=False)


def test_checkpoints_of_adapters_alone_stay_small_and_resume(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)
    whole = run(tmp_path, AdaptersOnly, memory, saver=saver)
    frozen = sum(p.nbytes for p in Head().backbone.parameters())
    paths = sorted((tmp_path / "ck").glob("*=*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        assert path.stat().st_size < frozen / 2
        assert differences(whole, run(tmp_path, AdaptersOnly, memory, path)) == [], path.name


def test_what_is_not_as_in_the_module_is_kept() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    store = Store()
    store.add(net, "first")
    with torch.no_grad():
        net[1].weight += 1
    store.add(net, "second")
    expected = [dict(candidate.parameters) for candidate in store]
    state = store.state_dict()
    leave_out_frozen(state, net)
    first, second = state["window"]
    trained = {"0.weight", "0.bias"}
    assert set(first["parameters"]) == {*trained, "1.weight"}
    assert set(second["parameters"]) == trained
    assert [set(c.parameters) for c in store] == [{*trained, "1.weight", "1.bias"}] * 2

    again = Store()
    again.load_state_dict(state)
    for _ in range(2):  # the second time the weights are others
        again.put_frozen_back(net)
        for parameters, candidate in zip(expected, again, strict=True):
            assert parameters.keys() == candidate.parameters.keys()
            for name, tensor in parameters.items():
                assert torch.equal(tensor, candidate.parameters[name])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
    held = [candidate.parameters["1.bias"].data_ptr() for candidate in again]
    assert held[0] == held[1], "one copy for all"


def test_the_average_is_of_what_is_trained(tmp_path, caplog) -> None:
    """Head's optimizer has the frozen parameters too."""
    twa, module = memory(), Head()
    before = weights(module.backbone)
    trainer(tmp_path, callbacks=[twa]).fit(module, loader())
    trained = sum(p.numel() for p in module.net.parameters())
    assert f" of {trained} parameters in 1 block" in caplog.text
    assert torch.equal(weights(module.backbone), before)
    beta = twa.averaging_weights[:, 0]
    for name, parameter in module.net.named_parameters():
        mix = sum(
            b * c.parameters[f"net.{name}"].double()
            for b, c in zip(beta, twa.candidates, strict=True)
        )
        torch.testing.assert_close(parameter.double(), mix, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def peft() -> Any:
    """The package, without its advice about packages of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def language_model(peft: Any, **adapters: Any) -> nn.Module:
    """A tiny GPT-2 with tied embeddings, activation checkpointing and LoRA adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=32,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = GPT2LMHeadModel(config)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.lm_head.weight is model.transformer.wte.weight
        lora = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **adapters}
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


class Adapted(L.LightningModule):
    """Adapters that learn to count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def counting() -> DataLoader:
    starts = torch.arange(24).unsqueeze(1)
    return DataLoader(TensorDataset((starts + torch.arange(8)) % 32), batch_size=8)


# --- transformers with adapters


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["ln_f"]}])
def test_lora_averages_the_adapters_alone(tmp_path, peft, options) -> None:
    net = language_model(peft, **options)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    module, twa = Adapted(net), TWACallback(4, collect=CollectConfig(start=1))
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(module, counting())

    assert twa.phase == "done"
    beta, names = twa.averaging_weights[:, 0], dict(net.named_parameters())
    assert not torch.allclose(beta, torch.full_like(beta, 1 / 3), atol=1e-3), "nothing was learned"
    for name, parameter in names.items():
        held = [c.parameters[f"net.{name}"] for c in twa.candidates]
        if name not in trained:
            assert torch.equal(parameter, before[name])
            assert all(tensor is held[0] for tensor in held), "what is frozen is kept once"
            continue
        mix = sum(b * tensor.double() for b, tensor in zip(beta, held, strict=True))
        torch.testing.assert_close(parameter.double(), mix, rtol=1e-5, atol=1e-6)
    assert twa._run.optimization.optimizer is None
    state = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    for entry in state["callbacks"]["TWACallback"]["candidates"]["window"]:
        assert set(entry["parameters"]) == {f"net.{name}" for name in trained}

    inputs = next(iter(counting()))[0]
    expected = net(input_ids=inputs).logits
    merged = net.merge_and_unload()  # the adapters of the average, in the model itself
    torch.testing.assert_close(merged(input_ids=inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_lora_resumes(tmp_path, peft) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[Tensor, TWACallback]:
        module, twa = Adapted(language_model(peft)), TWACallback(4, collect=CollectConfig(start=1))
        saver = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if ckpt_path is None else []
        trainer(folder, callbacks=[twa, *saver], enable_checkpointing=bool(saver)).fit(
            module, counting(), ckpt_path=ckpt_path
        )
        return weights(module), twa

    expected, whole = fit(tmp_path / "a")
    for epoch in (0, 2, 3, 4):
        found, twa = fit(tmp_path / "b", tmp_path / "a" / f"epoch={epoch}.ckpt")
        assert torch.equal(found, expected), epoch
        assert torch.equal(twa.averaging_weights, whole.averaging_weights)


def test_an_average_of_adapters_loads_into_the_model(tmp_path, peft) -> None:
    module, twa = Adapted(language_model(peft)), TWACallback(4, collect=CollectConfig(start=1))
    trainer(tmp_path, callbacks=[twa]).fit(module, counting())
    module.load_state_dict(average(twa))  # strict: under both names of tied embeddings
    name = "net.base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight"
    mean = torch.stack([c.parameters[name] for c in twa.candidates]).double().mean(0)
    torch.testing.assert_close(module.state_dict()[name].double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # BatchNorm's
def test_backbone_that_is_unfrozen_while_collecting(tmp_path) -> None:
    class Two(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
            self.head = nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return mse(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trainable, 0.05)

    twa = TWACallback(start_epoch=4, collect=CollectConfig(start=0))
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01)
    module, recorder, _ = fit(tmp_path, twa, Two(), val=None, callbacks=[finetuning])
    beta = twa.averaging_weights[:, 0]
    exact = sum(b * recorder.epochs[e] for e, b in enumerate(beta))
    torch.testing.assert_close(weights(module), exact, rtol=1e-5, atol=1e-6)


class Unfreezes(L.Callback):
    """Unfreezes the first layer at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.net[0].requires_grad_(True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["default", "groups"])
def test_unfreezing_in_the_phase_is_told_to_have_no_effect(tmp_path, kind, first) -> None:
    subspace = SubspaceConfig(group_size=2) if kind == "groups" else None
    twa = TWACallback(4, collect=CollectConfig(start=0), subspace=subspace)
    callbacks = [Unfreezes(5), twa] if first else [twa, Unfreezes(5)]
    with pytest.warns(
        UserWarning, match=r"unfrozen in the phase \(2, the first is 'net.0.w"
    ) as all_:
        trainer(tmp_path, callbacks=callbacks, max_epochs=8).fit(Frozen(), loader())
    assert sum("unfrozen in the phase" in str(w.message) for w in all_) == 1
    assert twa.phase == "done"
