"""Values as people write them: strings and lists of YAML, mappings, omegaconf's, numpy's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import lightning_twa.pytorch_lightning as other_package
from lightning_twa import (
    CollectConfig,
    SolverConfig,
    StorageConfig,
    SubspaceConfig,
    SubspaceOptimizer,
    TWACallback,
    build_subspace,
)


class ListLike(Sequence):
    """A sequence that is neither a list nor a tuple, as omegaconf's."""

    def __init__(self, items: Sequence) -> None:
        self._items = list(items)

    def __getitem__(self, i: Any) -> Any:
        return self._items[i]

    def __len__(self) -> int:
        return len(self._items)


class DictLike(Mapping):
    """A mapping that is no dict."""

    def __init__(self, items: Mapping) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


LISTS = [list, tuple, ListLike, lambda items: str(tuple(items)), lambda items: str(list(items))]


@pytest.mark.parametrize("made", LISTS)
def test_lists_of_any_kind(made: Any) -> None:
    collect = CollectConfig(ema_decays=made([0.9, 0.99]), power_averages=made([0.1]))
    assert collect == CollectConfig(ema_decays=(0.9, 0.99), power_averages=(0.1,))
    assert SolverConfig(betas=made([0.8, 0.9])) == SolverConfig(betas=(0.8, 0.9))


def test_files_of_a_list_that_is_none() -> None:
    collect = CollectConfig(checkpoints=ListLike(["a.ckpt", "b.ckpt"]))
    assert collect.checkpoints == ["a.ckpt", "b.ckpt"]
    assert type(collect.checkpoints) is list  # it goes into checkpoints


def test_strings_that_yaml_leaves() -> None:
    assert SolverConfig(lr="1e-3", warmup="0", name="sgd") == SolverConfig(
        lr=0.001, warmup=0, name="sgd"
    )
    assert SolverConfig(radius="null") == SolverConfig()
    assert SubspaceConfig(bits="4", blocks="1000", rank="none").blocks == 1000
    assert SubspaceConfig(blocks="tensor").blocks == "tensor"
    collect = CollectConfig(start="0.5", max_candidates="None", every_n_epochs="2")
    assert (collect.start, collect.max_candidates, collect.every_n_epochs) == (0.5, None, 2)
    settings = TWACallback("4", cycles="1", validate_average="True", heldout="null").settings
    assert settings.start_epoch == 4
    assert settings.cycles == 1
    assert settings.validate_average is True
    assert settings.heldout is None
    assert TWACallback(save_average="false").settings.save_average is False
    assert TWACallback(phase_steps="32").settings.phase_steps == 32
    assert StorageConfig(dirpath="null").dirpath == "null"  # a directory may be called so


def test_numbers_of_numpy() -> None:
    collect = CollectConfig(start=np.int64(2), ema_decays=np.array([0.5]).tolist())
    assert type(collect.start) is int
    assert type(SolverConfig(lr=np.float32(0.5)).lr) is float


@pytest.mark.parametrize("made", [dict, DictLike])
@pytest.mark.parametrize("callback", [TWACallback, other_package.TWACallback])
def test_mappings_are_configurations(made: Any, callback: Any) -> None:
    twa = callback(
        collect=made({"start": 1, "ema_decays": ListLike([0.9])}),
        subspace=made({"bits": "4"}),
        solver=made({"_target_": "lightning_twa.SolverConfig", "radius": 1.5}),
        storage=made({"class_path": "lightning_twa.StorageConfig", "init_args": {"kind": "disk"}}),
    )
    assert twa.settings.collect == CollectConfig(start=1, ema_decays=(0.9,))
    assert twa.settings.subspace == SubspaceConfig(bits=4)
    assert twa.settings.solver == SolverConfig(radius=1.5)
    assert twa.settings.storage == StorageConfig(kind="disk")


def test_mappings_without_lightning() -> None:
    states = [{"w": torch.randn(3)} for _ in range(3)]
    subspace = build_subspace(states, {"rank": "1"})
    assert subspace.num_directions == 1
    optimizer = SubspaceOptimizer([torch.zeros(3)], subspace, {"lr": "1e-2"}, total_steps=2)
    assert optimizer.config.lr == 0.01


def test_an_argument_that_there_is_not() -> None:
    message = (
        "storage={'directory': 'x'}: StorageConfig has no argument 'directory'. It has kind, "
        "dirpath, dtype, offload_optimizer, cache_subspace."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        TWACallback(storage={"directory": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SolverConfig(lr="fast"), "Invalid SolverConfig.lr='fast'. Must be a number > 0"),
        (lambda: SubspaceConfig(bits="four"), "Invalid SubspaceConfig.bits='four'."),
        (lambda: SolverConfig(betas="0.9; 0.99"), "Invalid SolverConfig.betas='0.9; 0.99'."),
        (lambda: CollectConfig(ema_decays=0.9), "Invalid CollectConfig.ema_decays=0.9."),
        (
            lambda: TWACallback(heldout="test"),
            "Invalid heldout='test'. Must be one of 'auto', 'val', 'twa', or None (nothing is "
            "chosen).",
        ),
        (
            lambda: TWACallback(continue_from="last"),
            "Invalid continue_from='last'. Must be one of 'average', 'raw', or None (a finished "
            "run does not go on).",
        ),
        (lambda: TWACallback(data=["train"]), "Invalid data=['train']. Must be one of 'train'"),
    ],
)
def test_an_error_repeats_the_value_and_says_what_would_do(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_omegaconf_and_hydra() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(
        {
            "_target_": "lightning_twa.TWACallback",
            "start_epoch": 0.5,
            "collect": {"start": 1, "ema_decays": [0.9, 0.99], "exclude": ["head"]},
            "solver": {"betas": [0.8, 0.9], "lr": "${lr}"},
            "subspace": {"_target_": "lightning_twa.SubspaceConfig", "blocks": "tensor"},
            "lr": 0.1,
        }
    )
    given = {k: config[k] for k in ("start_epoch", "collect", "solver", "subspace")}
    expected = TWACallback(
        0.5,
        collect=CollectConfig(start=1, ema_decays=(0.9, 0.99), exclude="head"),
        solver=SolverConfig(betas=(0.8, 0.9), lr=0.1),
        subspace=SubspaceConfig(blocks="tensor"),
    ).settings
    assert TWACallback(**given).settings == expected
    hydra = pytest.importorskip("hydra.utils")
    del config["lr"]
    config["solver"]["lr"] = 0.1
    assert hydra.instantiate(config).settings == expected


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("start_epochs", "Did you mean 'start_epoch'?"),
        ("held_out", "Did you mean 'heldout'?"),
        ("lr", "It is one of SolverConfig: pass solver=SolverConfig(lr=...)."),
        ("bits", "It is one of SubspaceConfig: pass subspace=SubspaceConfig(bits=...)."),
        ("zzz", "It has start_epoch, data, collect, subspace, solver, storage, distribute, "),
    ],
)
def test_an_argument_that_there_is_not_names_what_there_is(argument: str, instead: str) -> None:
    message = f"TWACallback has no argument {argument!r}. {instead}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        TWACallback(**{argument: 1})


def test_errors_of_python_name_the_callback_too() -> None:
    with pytest.raises(
        TypeError, match=r"^TWACallback\.__init__\(\) takes from 1 to 16 positional"
    ):
        TWACallback(*range(20))  # type: ignore[arg-type]
    assert next(iter(inspect.signature(TWACallback).parameters)) == "start_epoch"
