"""What cannot work is said early, by name, and leaves Trainer and weights as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from helpers.common import Recorder, Regressor, loader, regression_data, trainer, weights
from helpers.plain import CollectConfig, TWACallback
from helpers.runs import Broken, fit_fails, plain_weights
from lightning_twa import SolverConfig, SubspaceConfig

pytestmark = pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains")


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return iter(regression_data())


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=16)


# --- settings that do not fit the Trainer


@pytest.mark.parametrize(
    ("start_epoch", "max_epochs", "given"),
    [
        (6, 6, "start_epoch=6"),
        (7, 6, "start_epoch=7"),
        (1 - 1e-9, 6, "start_epoch=0.999999999 (epoch 6)"),
    ],
)
def test_a_phase_that_would_never_start(tmp_path, start_epoch, max_epochs, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=start_epoch),
        f"{given} must be below max_epochs=6: the phase trains the averaging coefficients in the "
        f"epochs from start_epoch on. Lower start_epoch or raise max_epochs.",
        max_epochs=max_epochs,
    )


@pytest.mark.parametrize(
    ("start_epoch", "given"),
    [(0, "start_epoch=0"), (0.0, "start_epoch=0.0"), (0.1, "start_epoch=0.1 (epoch 0)")],
)
def test_no_epoch_to_collect_in(tmp_path, start_epoch, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=start_epoch),
        f"{given} leaves no epoch to collect candidates in. Pass start_epoch >= 2 (1 with "
        f"CollectConfig.every_n_train_steps), or CollectConfig.checkpoints for a soup.",
    )


@pytest.mark.parametrize(
    ("start", "given"), [(4, "CollectConfig.start=4"), (0.7, "CollectConfig.start=0.7")]
)
def test_collecting_that_starts_after_the_switch(tmp_path, start, given) -> None:
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, collect=CollectConfig(start=start)),
        f"{given} (epoch 4) must be below start_epoch=4: candidates are kept before the phase "
        f"starts.",
    )


TOO_FEW = (
    "TWA needs at least two candidates, but collecting {} gives {} before start_epoch={}. Start "
    "collecting earlier (CollectConfig.start), collect more often (every_n_epochs, "
    "every_n_train_steps), or raise start_epoch."
)


@pytest.mark.parametrize(
    ("start_epoch", "collect", "how", "count"),
    [
        (1, None, "every epoch of epochs 0 to 0", 1),
        (4, CollectConfig(start=3), "every epoch of epochs 3 to 3", 1),
        (4, CollectConfig(every_n_epochs=3), "every 3 epochs of epochs 0 to 3", 1),
        (4, CollectConfig(every_n_epochs=5), "every 5 epochs of epochs 0 to 3", 0),
    ],
)
def test_fewer_than_two_candidates_at_epoch_ends_is_found_in_setup(
    tmp_path, start_epoch, collect, how, count
) -> None:
    twa = TWACallback(start_epoch=start_epoch, collect=collect)
    fit_fails(tmp_path, twa, TOO_FEW.format(how, count, start_epoch))


@pytest.mark.parametrize(("every", "count"), [(9, 1), (17, 0)])
def test_fewer_than_two_candidates_by_steps_is_found_before_the_first_step(
    tmp_path, every, count
) -> None:
    collect = CollectConfig(start=0, every_n_train_steps=every)
    how = f"every {every} optimizer steps of epochs 0 to 3"
    fit_fails(tmp_path, TWACallback(start_epoch=4, collect=collect), TOO_FEW.format(how, count, 4))


def test_fewer_than_two_candidates_after_data_without_a_length_trains_on_with_a_warning(
    tmp_path,
) -> None:
    collect = CollectConfig(start=0, every_n_train_steps=100)
    twa = TWACallback(start_epoch=2, collect=collect, solver=SolverConfig(radius=1.0))
    module, recorder = Regressor(), Recorder(twa)
    message = (
        "TWA needs at least two candidates, but collecting every 100 optimizer steps of epochs 0 "
        "to 1 gave 0. Ordinary training goes on."
    )
    with pytest.warns(UserWarning, match="TWA") as caught:
        trainer(tmp_path, callbacks=[twa, recorder], max_epochs=4).fit(module, stream())
    texts = [str(w.message) for w in caught]
    assert texts.count(message) == 1
    (never,) = [text for text in texts if "TWA never ran" in text]
    assert never == (
        "TWA never ran: there were 0 candidates at start_epoch=2, and it needs two. The weights "
        "are those of ordinary training. Collect earlier, or more often (CollectConfig)."
    )
    assert len(recorder.steps) == 16
    assert torch.equal(weights(module), plain_weights(tmp_path, train=stream(), max_epochs=4))


def test_a_fraction_of_epochs_needs_max_epochs(tmp_path) -> None:
    message = (
        "{}=0.5 is a fraction of the run, but this Trainer has no limit (max_epochs=-1, "
        "max_steps=-1). Pass {} as an int, or set Trainer(max_epochs=...) or max_steps."
    )
    name = "start_epoch"
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=0.5),
        message.format(name, name),
        max_epochs=-1,
    )
    name = "CollectConfig.start"
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, collect=CollectConfig(start=0.5)),
        message.format(name, name),
        max_epochs=-1,
    )


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [(None, "cosine"), (SolverConfig(lr=0.1), "cosine"), (SolverConfig(schedule="constant"),) * 2],
)
def test_a_schedule_needs_a_length(tmp_path, solver, schedule) -> None:
    schedule = schedule if isinstance(schedule, str) else schedule.schedule
    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, solver=solver),
        f"The length of the phase is not known (max_epochs=-1, max_steps=-1, data='train'), but "
        f"schedule='{schedule}' needs it. Set max_epochs or max_steps, or use "
        f"SolverConfig(schedule='constant', lr=...).",
        max_epochs=-1,
    )


@pytest.mark.parametrize("data", ["val", "twa"])
def test_a_schedule_needs_the_length_of_the_phase_s_own_data(tmp_path, data) -> None:
    class WithHook(Regressor):
        def twa_dataloader(self) -> DataLoader:
            return stream()

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4, data=data),
        f"The length of the phase is not known (max_epochs=6, max_steps=-1, data='{data}'), but "
        f"schedule='cosine' needs it. Set phase_steps or max_steps (the data has no length), or "
        f"use SolverConfig(schedule='constant', lr=...).",
        module=WithHook(),
        val=stream(),
    )


MANUAL = (
    "TWACallback needs automatic optimization: with automatic_optimization=False, and with "
    "several optimizers, the module steps its own optimizers and the phase could not replace them. "
    "Use SolverConfig(name='uniform'), which has no phase; or average the weights in your own loop "
    "with build_subspace() and SubspaceOptimizer."
)


class Manual(Regressor):
    """Steps its own optimizers."""

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if self.count > 1 else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(self.count)]


# --- modules, optimizers, strategies


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_is_refused(tmp_path, optimizers) -> None:
    fit_fails(tmp_path, TWACallback(start_epoch=4), MANUAL, module=Manual(optimizers))


def test_several_optimizers_with_automatic_optimization_are_refused_by_lightning(tmp_path) -> None:
    class Two(Regressor):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(2)]

    the_trainer = trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)])
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):
        the_trainer.fit(Two(), loader())


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize("value", [None, []])
def test_no_optimizer_is_refused(tmp_path, value) -> None:
    class NoOptimizer(Broken):
        def configure_optimizers(self) -> Any:
            return value

    fit_fails(
        tmp_path,
        TWACallback(start_epoch=4),
        "TWACallback needs exactly one optimizer, but configure_optimizers() gave 0.",
        module=NoOptimizer(),
    )


def test_a_complex_parameter_is_refused(tmp_path: Path) -> None:
    module = Regressor()
    module.phase_shift = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"cannot average 'phase_shift' of dtype torch\.complex64"):
        trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)]).fit(module, loader())
    module.phase_shift.requires_grad_(False)
    trainer(tmp_path, callbacks=[TWACallback(start_epoch=4)]).fit(module, loader())


@pytest.mark.parametrize("device", ["gpu0", 3.5, "cuda:x"])
def test_a_device_that_torch_does_not_know_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid SubspaceConfig\.device=.* torch\.device takes"):
        SubspaceConfig(device=device)


@pytest.mark.parametrize(
    "collect",
    [{"max_candidates": 4}, {"start": 4}, {"max_candidates": 3, "ema_decays": (0.9,)}],
)
def test_a_mask_that_would_keep_every_candidate_fails_at_the_start(tmp_path, collect) -> None:
    twa = TWACallback(
        8,
        subspace=SubspaceConfig(parametrization="mask", mask_size=5),
        collect=CollectConfig(**{"start": 0, **collect}),
    )
    the_trainer = trainer(tmp_path, callbacks=[twa], max_epochs=10)
    with pytest.raises(ValueError, match=r"mask_size=5 needs more than 5 .* there will be 4\."):
        the_trainer.fit(Regressor(), loader())
    assert the_trainer.global_step == 0


@pytest.mark.parametrize("name", ["SubspaceConfig.device", "CollectConfig.ema_device"])
def test_a_device_that_is_not_there_fails_at_the_start(tmp_path, name) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    subspace = SubspaceConfig(device="cuda") if name.split(".")[1] == "device" else None
    collect = CollectConfig(ema_decays=(0.9,), ema_device="cuda") if subspace is None else None
    twa = TWACallback(4, subspace=subspace, collect=collect)
    the_trainer = trainer(tmp_path, callbacks=[twa])
    with pytest.raises(ValueError, match=f"^{name}='cuda' cannot be used on this machine"):
        the_trainer.fit(Regressor(), loader())
    assert the_trainer.global_step == 0
