"""A damaged state in a checkpoint is a clear error; states of this format are read for ever."""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.common import TESTS, Regressor, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import differences, interrupted, ordered, run, twa
from lightning_twa import StorageConfig
from lightning_twa.candidates import CandidateFileError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints of every phase, with candidates in memory and in files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in ("memory", "disk"):
        run(
            folder,
            Regressor,
            lambda kind=kind: damaged_twa(folder, kind),
            saver=ModelCheckpoint(folder / kind, save_top_k=-1, save_on_train_epoch_end=True),
        )
    return folder


def damaged_twa(folder: Path, kind: str) -> TWACallback:
    root = None if kind == "memory" else str(folder / "candidates")
    return TWACallback(
        4, collect=CollectConfig(start=1), storage=StorageConfig(kind=kind, dirpath=root)
    )


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry of nested dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def grown(value: Any) -> Any:
    """The same kind of thing in another size or range."""
    if isinstance(value, Tensor):
        return torch.cat([value.reshape(-1), torch.zeros(1, dtype=value.dtype)])
    return {str: f"{value}x", int: -1, float: float("nan"), bool: None}.get(type(value))


DAMAGE: dict[str, Callable[[Any, Any], Any]] = {
    "missing": lambda container, key: container.pop(key),
    "None": lambda container, key: container.__setitem__(key, None),
    "another type": lambda container, key: container.__setitem__(key, {"x": torch.zeros(3)}),
    "another size": lambda container, key: container.__setitem__(key, grown(container[key])),
}


# What may be there or not, or has no wrong value, or is compared with nothing.
FREE = ("betas", "lr", "weight_decay", "ridge", "epoch_batches", "frozen", "skipped_steps")


@pytest.mark.matrix(2)
@pytest.mark.slow
@pytest.mark.parametrize("epoch", [2, 4])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_damaged_state_is_a_clear_error_and_never_another_average(
    checkpoints, tmp_path, kind, epoch
) -> None:
    original = checkpoints / kind
    (path,) = [p for p in original.glob("*=*.ckpt") if f"epoch={epoch}-" in p.name]
    good = torch.load(path, weights_only=True)
    whole = run(tmp_path, Regressor, lambda: damaged_twa(checkpoints, kind))
    own = good["callbacks"]["TWACallback"]
    everywhere = [p for p in places(own) if not set(p) & set(FREE)]
    rng = random.Random(epoch)
    for place in rng.sample(everywhere, min(40, len(everywhere))):
        how = rng.choice(list(DAMAGE))
        bad = copy.deepcopy(good)
        DAMAGE[how](at(bad["callbacks"]["TWACallback"], place[:-1]), place[-1])
        torch.save(bad, tmp_path / "bad.ckpt")
        try:
            resumed = run(
                tmp_path, Regressor, lambda: damaged_twa(checkpoints, kind), tmp_path / "bad.ckpt"
            )
        except (ValueError, CandidateFileError):
            continue
        else:  # what nobody uses any more
            assert differences(whole, resumed) in ([], ["callback state"]), (place, how)


@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")
def test_a_checkpoint_of_this_format_can_be_read(tmp_path) -> None:
    """Written by version 0.1.0 in the phase; later versions must go on from it."""
    path = TESTS / "fixtures" / "format_1_phase.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"]["TWACallback"]["format_version"] == 1
    module, twa = Regressor(), TWACallback(4, collect=CollectConfig(start=1))
    trainer(tmp_path, callbacks=[twa]).fit(module, ordered(), ordered(32, seed=1), ckpt_path=path)
    assert twa.phase == "done"
    assert twa.candidate_names == ["epoch=1", "epoch=2", "epoch=3"]
    window = checkpoint["callbacks"]["TWACallback"]["candidates"]["window"]
    for name, parameter in module.named_parameters():
        mixed = sum(
            float(b) * c["parameters"][name].double()
            for b, c in zip(twa.averaging_weights[:, 0], window, strict=True)
        )
        torch.testing.assert_close(parameter.detach().double(), mixed, rtol=1e-5, atol=1e-6)


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


def write_fixture() -> None:
    """How the fixture was made: ``PYTHONPATH=tests python tests/checkpoint/test_format.py``."""
    folder = TESTS / "fixtures"
    folder.mkdir(exist_ok=True)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(
        folder,
        Regressor,
        lambda: TWACallback(4, collect=CollectConfig(start=1)),
        saver=saver,
    )
    os.replace(folder / "epoch=4.ckpt", folder / "format_1_phase.ckpt")
    for path in folder.glob("epoch=*.ckpt"):
        path.unlink()


if __name__ == "__main__":
    write_fixture()
