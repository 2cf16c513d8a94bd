"""A run that is stopped and resumed from any checkpoint equals one that was not, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.common import Recorder, Regressor, loader, mse, trainer, weights
from helpers.resume import (
    EpochOrder,
    ResumableLoader,
    differences,
    equal,
    ordered,
    run,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_twa import (
    CollectConfig,
    SolverConfig,
    SubspaceConfig,
    SubspaceOptimizer,
    TWACallback,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]

WRITTEN = {
    "at the end of an epoch": {"save_on_train_epoch_end": True},
    "at the end of validation": {"save_on_train_epoch_end": False},
    "after every step": {"every_n_train_steps": 1},
}


def twa(**kwargs: Any) -> TWACallback:
    """Candidates of epochs 1 to 3, the phase in epochs 4 and 5, unless told otherwise."""
    return TWACallback(**{"start_epoch": 4, "collect": CollectConfig(start=1), **kwargs})


CASES: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    # callback, BatchNorm, Trainer
    "plain Lightning": ({}, False, {}),
    "TWA-t": ({}, False, {}),
    "TWA-v": ({"data": "val"}, False, {}),
    "TWA-t, BatchNorm": ({}, True, {}),
    "TWA-v, BatchNorm": ({"data": "val"}, True, {}),
    "TWA-t, validation within epochs": ({}, True, {"val_check_interval": 2}),
    "TWA-v, interval that does not fit": ({"data": "val"}, True, {"val_check_interval": 3}),
    "uniform average validated": ({"validate_average": True}, True, {"val_check_interval": 2}),
    "accumulated gradients": ({}, False, {"accumulate_grad_batches": 3}),
    "accumulated gradients, TWA-v": ({"data": "val"}, False, {"accumulate_grad_batches": 2}),
    "candidates by steps": (
        {"collect": CollectConfig(start=0, every_n_train_steps=3)},
        False,
        {"accumulate_grad_batches": 2},
    ),
    "candidates by steps, newest two": (
        {"collect": CollectConfig(start=0, every_n_train_steps=2, max_candidates=2)},
        False,
        {},
    ),
    "newest two candidates": (
        {"collect": CollectConfig(start=0, max_candidates=2), "data": "val"},
        False,
        {},
    ),
    "AdamW, a block per tensor": (
        {
            "subspace": SubspaceConfig(blocks="tensor"),
            "solver": SolverConfig(name="adamw", schedule="linear"),
        },
        False,
        {},
    ),
    "four bits": ({"subspace": SubspaceConfig(bits=4)}, True, {}),
    "SGD on the paper's basis": (
        {
            "subspace": SubspaceConfig(basis="candidates"),
            "solver": SolverConfig(name="sgd", lr=0.05, schedule="step"),
        },
        False,
        {},
    ),
}
EVERY_KIND = ("plain Lightning", "TWA-t", "TWA-v", "TWA-v, BatchNorm", "uniform average validated")


def saved(path: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path.glob("*.ckpt"), key=lambda p: int(re.search(r"step=(\d+)", p.stem).group(1)))


@pytest.mark.parametrize(
    ("case", "written"),
    [(c, w) for c in CASES for w in WRITTEN if c in EVERY_KIND or w == "after every step"],
)
def test_a_run_resumed_from_any_checkpoint_equals_an_uninterrupted_one(
    tmp_path, case, written
) -> None:
    kwargs, batchnorm, trainer_kwargs = CASES[case]

    def make_twa() -> TWACallback | None:
        return None if case == "plain Lightning" else twa(**kwargs)

    def make_module() -> Regressor:
        return Regressor(batchnorm)

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, **WRITTEN[written])
    whole = run(tmp_path, make_module, make_twa, saver=saver, **trainer_kwargs)
    checkpoints = saved(tmp_path / "saved")
    per_epoch = {"after every step": 1 if "accumulate" in case else 2}.get(written, 1)
    assert len(checkpoints) >= 6 * per_epoch
    for checkpoint in checkpoints:
        resumed = run(tmp_path, make_module, make_twa, ckpt_path=checkpoint, **trainer_kwargs)
        assert differences(whole, resumed) == [], checkpoint.name


def test_a_run_resumed_again_and_again_equals_an_uninterrupted_one(tmp_path) -> None:
    def make() -> TWACallback:
        return twa(data="val", validate_average=True)

    def make_module() -> Regressor:
        return Regressor(batchnorm=True)

    whole = run(tmp_path, make_module, make)
    last: Path | None = None
    for epochs in range(1, 6):  # stops after each epoch, as a queue with a time limit would
        stop = type(
            "Stop",
            (L.Callback,),
            {
                "on_train_epoch_end": lambda self, trainer, module, e=epochs: (
                    trainer.save_checkpoint(tmp_path / f"{e}.ckpt")
                    if trainer.current_epoch == e - 1
                    else None
                ),
                "on_train_epoch_start": lambda self, trainer, module, e=epochs: (
                    (_ for _ in ()).throw(TimeoutError("queue"))
                    if trainer.current_epoch == e
                    else None
                ),
            },
        )()
        L.seed_everything(epochs if last else 1, verbose=False)
        the_trainer = trainer(tmp_path, callbacks=[make(), stop])
        with pytest.raises(TimeoutError, match="queue"):
            the_trainer.fit(make_module(), ordered(), ordered(32, seed=1), ckpt_path=last)
        last = tmp_path / f"{epochs}.ckpt"
    assert differences(whole, run(tmp_path, make_module, make, ckpt_path=last)) == []


@pytest.mark.parametrize("written", ["at the end of validation", "after every step"])
def test_max_steps_without_max_epochs(tmp_path, written) -> None:
    """At the end of an epoch Lightning's own resume of such a run repeats the epoch's number."""
    how = {"max_epochs": -1, "max_steps": 22}
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, **WRITTEN[written])
    whole = run(tmp_path, Regressor, twa, saver=saver, **how)
    assert whole.callback["phase"] == "done"
    checkpoints = saved(tmp_path / "saved")
    assert checkpoints
    for checkpoint in checkpoints:
        resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, **how)
        assert differences(whole, resumed) == [], checkpoint.name


def test_a_loader_that_cannot_go_on_within_an_epoch_still_gives_a_whole_phase(tmp_path) -> None:
    """Lightning repeats the epoch's first batches then; the number of steps is the same."""

    def plain() -> Any:
        return loader()

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1)
    whole = run(tmp_path, Regressor, twa, saver=saver, train=plain)
    for checkpoint in saved(tmp_path / "saved")[11:]:
        step = int(re.search(r"step=(\d+)", checkpoint.stem).group(1))
        if step % 4:
            with pytest.warns(UserWarning, match="your dataloader is not resumable"):
                resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, train=plain)
        else:
            resumed = run(tmp_path, Regressor, twa, ckpt_path=checkpoint, train=plain)
            assert differences(whole, resumed) == []
        assert len(resumed.steps) == 24 - step
        assert resumed.callback["phase"] == "done"


# --- with another set of callbacks


class AtTheSwitch(L.Callback):
    """Copies the user's states when the phase is about to start, before the TWA callback."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 4:
            optimizer, config = trainer.optimizers[0], trainer.lr_scheduler_configs[0]
            self.optimizer = torch.utils._pytree.tree_map(
                lambda v: v.clone() if isinstance(v, torch.Tensor) else v, optimizer.state_dict()
            )
            self.scheduler = dict(config.scheduler.state_dict())


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


def interrupted(tmp_path: Path, epoch: int, **kwargs: Any) -> Path:
    """A checkpoint from the end of an epoch."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, Regressor, lambda: twa(**kwargs), saver=saver)
    return saved(tmp_path)[epoch]


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
            (optimizer,) = trainer.optimizers
            if isinstance(optimizer, SubspaceOptimizer):
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
    again = sorted((tmp_path / "again").glob("*.ckpt"))[:-1]  # not the last, which is finished
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


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_format_is_refused(tmp_path, version) -> None:
    path = interrupted(tmp_path, 2)
    checkpoint = torch.load(path, weights_only=True)
    (key,) = [k for k in checkpoint["callbacks"] if "TWACallback" in k]
    checkpoint["callbacks"][key]["format_version"] = version
    torch.save(checkpoint, path)
    message = (
        f"The checkpoint holds TWACallback state of format_version={version}, but this version of "
        f"lightning-twa reads 1. Use the version that wrote it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(tmp_path, Regressor, twa, ckpt_path=path)


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


# --- runs that were finished


def test_resuming_a_finished_run_changes_nothing(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    whole = run(tmp_path, Regressor, twa, saver=saver)
    resumed = run(tmp_path, Regressor, twa, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert resumed.steps == []
    assert differences(whole, resumed) == []


def test_a_phase_that_was_stopped_within_an_epoch_does_not_train_on(tmp_path) -> None:
    """Its average is finished: a resumed Trainer would take ordinary steps away from it."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == 18

    the_twa, saver = twa(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    the_trainer = trainer(tmp_path, callbacks=[Stop(), the_twa, saver], enable_checkpointing=True)
    module = Regressor()
    the_trainer.fit(module, ordered())
    assert the_twa.phase == "done"
    assert the_trainer.global_step == 18
    the_trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (tmp_path / "epoch=4-step=18.ckpt", tmp_path / "after.ckpt"):
        resumed, recorder = Regressor(), Recorder(the_twa)
        with pytest.raises(RuntimeError, match="was finished, but the Trainer goes on with epoch"):
            trainer(tmp_path, callbacks=[twa(), recorder]).fit(resumed, ordered(), ckpt_path=path)
        assert recorder.steps == []
        assert torch.equal(weights(resumed), weights(module))


def test_the_helper_s_order_is_a_function_of_the_epoch() -> None:
    batches = ordered()
    assert isinstance(batches, ResumableLoader)
    assert isinstance(batches.sampler, EpochOrder)
    first = [x for x, _ in batches]
    assert equal(first, [x for x, _ in batches])
    batches.load_state_dict({"taken": 3})
    assert equal([x for x, _ in batches], first[3:])
    batches.sampler.set_epoch(1)
    assert not equal(first, [x for x, _ in batches])
