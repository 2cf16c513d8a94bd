"""What the phase keeps in checkpoints, and what a resumed phase refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_twa
from helpers.common import Regressor, mse, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, equal, interrupted, ordered, run, saved, twa
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class AtTheSwitch(L.Callback):
    """Copies the user's states when the phase is about to start, before the TWA callback."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 4:
            optimizer, config = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
            self.optimizer = torch.utils._pytree.tree_map(
                lambda v: v.clone() if isinstance(v, torch.Tensor) else v, optimizer.state_dict()
            )
            self.scheduler = dict(config.scheduler.state_dict())


# --- with another set of callbacks


@pytest.mark.parametrize("data", ["train", "val"])
def test_checkpoints_of_the_phase_hold_the_user_s_states_as_they_were_at_the_switch(
    tmp_path, data
) -> None:
    before = AtTheSwitch()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    trainer(tmp_path, callbacks=[before, twa(data=data), saver], enable_checkpointing=True).fit(
        Regressor(), ordered(), ordered(32, seed=1)
    )
    in_phase = [c for c in saved(tmp_path) if re.search("epoch=[45]", c.stem)]
    assert len(in_phase) == (8 if data == "train" else 4)
    for path in in_phase:
        checkpoint = torch.load(path, weights_only=True)
        assert equal(checkpoint["optimizer_states"], [before.optimizer])
        assert equal(checkpoint["lr_schedulers"], [before.scheduler])


@pytest.mark.parametrize("data", ["train", "val"])
def test_a_checkpoint_of_the_phase_resumes_without_the_callback(tmp_path, data) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[twa(data=data), saver], enable_checkpointing=True).fit(
        Regressor(), ordered(), ordered(32, seed=1)
    )
    path = saved(tmp_path)[4]
    assert "epoch=4" in path.stem
    module = Regressor()
    trainer(tmp_path).fit(module, ordered(), ordered(32, seed=1), ckpt_path=path)

    checkpoint = torch.load(path, weights_only=True)
    by_hand = Regressor()
    by_hand.load_state_dict(checkpoint["state_dict"])
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05, momentum=0.9)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    batches = ordered()
    batches.sampler.set_epoch(5)
    for x, y in batches:
        optimizer.zero_grad()
        mse(by_hand.net(x), y).backward()
        optimizer.step()
    assert torch.equal(weights(module), weights(by_hand))


def test_the_callback_can_be_added_to_a_checkpoint_from_before(tmp_path) -> None:
    whole = run(tmp_path, Regressor, twa)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    run(tmp_path, Regressor, lambda: None, saver=saver)
    for step in (2, 4, 7, 8):  # candidates are taken from the end of epoch 1 (step 8) on
        path = next(p for p in saved(tmp_path) if f"step={step}" in p.stem.split("-"))
        added = run(tmp_path, Regressor, twa, ckpt_path=path)
        assert differences(whole, added) == [], step
    late = next(p for p in saved(tmp_path) if "step=16" in p.stem)
    with pytest.raises(ValueError, match=r"at least two candidates, but collecting .* gives 1"):
        run(tmp_path, Regressor, twa, ckpt_path=late)
    after = next(p for p in saved(tmp_path) if "step=20" in p.stem)
    with pytest.raises(ValueError, match=r"at least two candidates, but collecting .* gives 0"):
        run(tmp_path, Regressor, twa, ckpt_path=after)


# --- settings that changed in between


@pytest.mark.parametrize(
    "subspace",
    [
        SubspaceConfig(blocks="tensor"),
        SubspaceConfig(rank=1),
        SubspaceConfig(basis="candidates"),
    ],
)
def test_another_subspace_is_refused_in_the_phase_and_not_before(tmp_path, subspace) -> None:
    solver = SolverConfig(lr=0.1, schedule="constant")
    path = interrupted(tmp_path, 4, solver=solver)

    def changed() -> TWACallback:
        return twa(subspace=subspace, solver=solver)

    with pytest.raises(ValueError, match=r"phase was started with .*Resume with the same settings"):
        run(tmp_path, Regressor, changed, ckpt_path=path)
    before = run(tmp_path, Regressor, changed, ckpt_path=saved(tmp_path)[2])
    assert differences(run(tmp_path, Regressor, changed), before) == []


def test_another_solver_is_refused_in_the_phase(tmp_path) -> None:
    path = interrupted(tmp_path, 4)
    message = (
        r"^The checkpoint's phase was started with solver='full_matrix_adam', but this callback "
        r"has solver='adamw'\. Resume with the same settings\.$"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, Regressor, lambda: twa(solver=SolverConfig(name="adamw")), ckpt_path=path)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "val"}, "data='train', but this callback has data='val'"),
        ({"solver": SolverConfig(radius=0.5)}, "radius=None, but this callback has radius=0.5"),
        ({"solver": SolverConfig(lr=5.0)}, "lr=None, but this callback has lr=5.0"),
        ({"solver": SolverConfig(schedule="constant")}, "schedule='cosine', but .*'constant'"),
        (
            {"solver": SolverConfig(betas=(0.5, 0.5), sam_rho=0.5)},
            r"betas=\[0.9, 0.999\], sam_rho=0.0, but .* has betas=\[0.5, 0.5\], sam_rho=0.5",
        ),
    ],
)
def test_what_the_phase_is_trained_with_does_not_change_unnoticed(
    tmp_path, options, message
) -> None:
    path = interrupted(tmp_path, 4)
    with pytest.raises(ValueError, match=f"was started with {message}"):
        run(tmp_path, Regressor, lambda: twa(**options), ckpt_path=path)


@pytest.mark.matrix(3)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("max_epochs", [5, 7, 12])
@pytest.mark.parametrize("group_size", [None, 2])
def test_a_phase_of_another_length_keeps_within_the_radius(
    tmp_path, max_epochs, group_size
) -> None:
    subspace = SubspaceConfig(group_size=group_size)
    solver = SolverConfig(radius=0.5)

    def make_twa() -> TWACallback:
        return TWACallback(3, collect=CollectConfig(start=0), solver=solver, subspace=subspace)

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run(tmp_path, Regressor, make_twa, saver=saver, max_epochs=8)
    lengths = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            (callback,) = (c for c in trainer.callbacks if isinstance(c, lightning_twa.TWACallback))
            optimizer = callback._run.optimization.optimizer
            if optimizer is not None:
                lengths.append((optimizer.path_length.max().item(), optimizer.last_lr))

    def fit(path: Path) -> Tensor:
        module = Regressor()
        saver = ModelCheckpoint(tmp_path / "again", "{epoch}", save_top_k=-1)
        callbacks = [make_twa(), Look(), *([saver] if path.parent == tmp_path else [])]
        the_trainer = trainer(
            tmp_path, callbacks=callbacks, max_epochs=max_epochs, enable_checkpointing=True
        )
        the_trainer.fit(module, ordered(), ckpt_path=path)
        return weights(module)

    whole = fit(tmp_path / "epoch=3.ckpt")
    assert len(lengths) == 4 * (max_epochs - 4)
    again = sorted((tmp_path / "again").glob("*=*.ckpt"))[:-1]  # not the last, which is finished
    for path in again:
        assert torch.equal(fit(path), whole), "resumed a second time"
    assert max(length for length, _ in lengths) <= 0.5 * (1 + 1e-9)
    assert max(lr for _, lr in lengths) > 0, "it goes on"


def test_fewer_candidates_than_the_phase_began_with_are_not_dropped(tmp_path) -> None:
    whole = run(tmp_path, Regressor, twa)
    path = interrupted(tmp_path, 4)
    collect = CollectConfig(start=1, max_candidates=2)
    resumed = run(tmp_path, Regressor, lambda: twa(collect=collect), ckpt_path=path)
    assert differences(whole, resumed) == []


def test_the_directions_are_those_of_the_checkpoint_whatever_this_machine_computes(
    tmp_path,
) -> None:
    """An eigenvector's sign is arbitrary; the mirrored basis with mirrored coefficients is the same
    phase, and mixing it with the basis computed here would not be.
    """
    whole = run(tmp_path, Regressor, twa)
    path = interrupted(tmp_path, 4)
    checkpoint = torch.load(path, weights_only=True)
    (key,) = [k for k in checkpoint["callbacks"] if "TWACallback" in k]
    own = checkpoint["callbacks"][key]
    own["mixing"].neg_()
    own["optimizer"]["coefficients"].neg_()
    own["optimizer"]["solver"]["state"][0]["exp_avg"].neg_()
    torch.save(checkpoint, path)
    resumed = run(tmp_path, Regressor, twa, ckpt_path=path)
    assert equal(whole.state, resumed.state)
    assert len(resumed.steps) == 4


def test_resuming_another_model_is_refused(tmp_path) -> None:
    """Lightning compares the weights; what it lets pass must not be averaged silently."""

    class Wider(Regressor):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    path = interrupted(tmp_path, 2)
    with pytest.raises(ValueError, match=r"Candidate \d has no tensor 'extra.weight'|parameter"):
        run(tmp_path, Wider, twa, ckpt_path=path)
