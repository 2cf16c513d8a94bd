"""Weights from checkpoint files: what is read of their content, and what is refused."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from helpers.common import Frozen, Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.readers import PARAMETERS, equal, fresh, read, refused, saved, tensors_of, whole
from lightning_twa import StorageConfig
from lightning_twa.candidates import Candidate
from lightning_twa.candidates.files import make_directory, write_candidate
from lightning_twa.candidates.find import find_files
from lightning_twa.candidates.readers import load_checkpoint, read_candidate_from, read_file

FORMS = {
    "Lightning": lambda s: {"state_dict": s, "pytorch-lightning_version": "2.6.0", "epoch": 3},
    "Lightning and a part called model": lambda s: {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": s,
        "model": {"w": torch.randn(2)},
    },
    "only state_dict": lambda s: {"state_dict": s},
    "state dict": lambda s: s,
    "ordered": OrderedDict,
    "parameters": lambda s: {
        n: nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in s.items()
    },
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "model": "resnet18"},
    "extra state": lambda s: {**s, "net.2._extra_state": {"a": 1}, "net.3._extra_state": None},
}


# --- Content


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_are_read(tmp_path: Path, form: str, suffix: str, zipped: bool) -> None:
    state = fresh()
    path = tmp_path / f"epoch=3{suffix}"
    saved(path, FORMS[form](state), _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    tensors = read_file(path)
    assert equal(tensors, state)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    candidate = read(path, fresh())
    assert candidate.name == "epoch=3"
    assert list(candidate.parameters) == list(PARAMETERS)
    assert equal(whole(candidate), state)
    for tensor in whole(candidate).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = fresh()
    path = tmp_path / "model.v1.safetensors"
    save_file(state, path, metadata={"format": "pt", "format_version": "9"})
    assert equal(dict(sorted(read_file(path).items())), dict(sorted(state.items())))
    candidate = read(path, fresh())
    assert candidate.name == "model.v1"
    assert equal(whole(candidate), state), "in the order of the model"


def test_the_order_is_the_models(tmp_path: Path) -> None:
    state = fresh()
    path = saved(tmp_path / "a.pt", dict(reversed(state.items())))
    assert equal(whole(read(path, state)), state)


def test_memory_is_contiguous(tmp_path: Path) -> None:
    state = fresh(**{"net.0.weight": torch.randn(2, 3, dtype=torch.float64).t()})
    path = saved(tmp_path / "a.pt", state)
    assert read_file(path)["net.0.weight"].is_contiguous() is False
    candidate = read(path, state)
    assert all(tensor.is_contiguous() for tensor in whole(candidate).values())
    assert equal(whole(candidate), state)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], r"no state dict with tensors, but list\. Save model\.state_dict\(\)"),
        (torch.ones(2), r"but Tensor\."),
        ({}, r"but \[\]"),
        ({"epoch": 3, "model": "x"}, r"but \['epoch', 'model'\]"),
        ({3: torch.ones(2)}, r"but \[3\]"),
        ({"state_dict": {}}, r"but \['state_dict'\]"),
        ({"model": {"encoder": {"w": torch.ones(2)}}}, r"but \['model'\]"),
        (
            {"model": {"w": torch.ones(2)}, "model_state_dict": {"w": torch.ones(2)}},
            r"several keys, \['model', 'model_state_dict'\]\. Save one alone",
        ),
        ({"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}}, r"several keys"),
        ({"w": torch.ones(2).to_sparse()}, r"has no tensor 'net\.0\.weight'"),
        ({"w": torch.ones(2, device="meta")}, r"'w' is a Tensor on meta, .*all its values"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, match: str) -> None:
    refused(saved(tmp_path / "a.pt", content), fresh(), match)


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_sharded_tensors_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import distribute_tensor

    # torch 2.4 loads a DTensor only where FSDP was imported before.
    found, unknown = r"'w' is a DTensor.*gathered on one process", r"Unsupported global.*DTensor"
    match = rf"(?:{found}|{unknown}|holds no state dict with tensors, but \['w'\])"
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        path = saved(tmp_path / "a.pt", {"w": distribute_tensor(torch.randn(4), mesh)})
        refused(path, fresh(), match)
    finally:
        dist.destroy_process_group()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_code_of_python_objects_is_never_run(
    tmp_path: Path, monkeypatch: Any, zipped: bool, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "made"
    content = {"state_dict": fresh(), "hparams": Hostile(target)}
    path = saved(tmp_path / "a.ckpt", content, _use_new_zipfile_serialization=zipped)
    assert equal(read_file(path), content["state_dict"])
    with pytest.raises(ValueError, match=r"holds Python objects(?!.*Please use).*GLOBAL.*mkdir"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "or else the test tests nothing"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("how", ["empty", "text", "truncated", "header"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, how: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".ckpt":
        saved(path, fresh())
    else:
        save_file(fresh(), path)
    data = path.read_bytes()
    contents = {"empty": b"", "text": b"not weights at all", "truncated": data[:-30]}
    path.write_bytes(contents.get(how, b"PK\x03\x04\xff\xff\xff\xff" + data[8:40]))
    kind = {"empty": "is empty", "text": "was not written by torch.save.*b'not weights"}
    damaged = "is damaged or truncated.*Restore it"
    match = (
        kind.get(how, damaged) if suffix == ".ckpt" or how == "empty" else "no safetensors file.*"
    )
    refused(path, fresh(), match)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        refused(tmp_path / name, fresh(), "is a pointer of Git LFS.*git lfs pull")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    save_file(fresh(), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", fresh(), "was not written by torch.save.*suffix .safetensors")
    refused(saved(tmp_path / "a.safetensors", fresh()), fresh(), "is no safetensors file")


# --- Candidates of a run


def test_a_candidate_file_is_joined_with_what_is_frozen(tmp_path: Path) -> None:
    state = fresh()
    own = Candidate(
        "epoch=1",
        {"net.0.weight": state["net.0.weight"]},
        {name: state[name] for name in state if name not in PARAMETERS},
    )
    folder = make_directory(tmp_path)
    write_candidate(tmp_path, folder, own)
    path = folder / "epoch=1.safetensors"
    refused(path, state, r"has no tensor 'net\.0\.bias', which the model has")
    write_candidate(tmp_path, folder, Candidate("frozen", {"net.0.bias": state["net.0.bias"]}, {}))
    assert equal(whole(read(path, state)), state)
    refused(folder / "frozen.safetensors", state, "holds a part of the weights: what is frozen")
    (folder / "frozen.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"frozen\.safetensors is not a safetensors file"):
        read_file(path)


def test_candidates_are_known_by_their_metadata_and_not_by_names(tmp_path: Path) -> None:
    state = {"parameters.w": torch.randn(3), "buffers.b": torch.randn(2)}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    assert sorted(read_file(path)) == sorted(state)
    save_file(state, path, metadata={"format_version": "1", "candidate": "epoch=1"})
    assert sorted(read_file(path)) == ["b", "w"]
    save_file(state, path, metadata={"format_version": "2", "candidate": "epoch=1"})
    refused(path, state, "has format_version '2'")
    save_file({"w": torch.ones(2)}, path, metadata={"format_version": "1", "candidate": "x"})
    refused(path, state, "was not written by lightning_twa")


@pytest.mark.parametrize("kind", [Regressor, Frozen])
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss")
def test_checkpoints_and_candidates_of_a_run_hold_the_same(tmp_path: Path, kind: Any) -> None:
    """A Trainer's checkpoints are written at the epochs whose ends are candidates."""
    module = kind()
    the_twa = TWACallback(
        start_epoch=4,
        collect=CollectConfig(start=1),
        storage=StorageConfig(kind="disk", dirpath=str(tmp_path / "c")),
    )
    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    the_trainer = trainer(tmp_path, callbacks=[the_twa, saver], enable_checkpointing=True)
    the_trainer.fit(module, loader(), loader(32, seed=1))
    candidates = find_files(tmp_path / "c" / "version_0")
    checkpoints = find_files(tmp_path / "ck" / "epoch=*.ckpt")
    assert [p.stem for p in candidates] == ["epoch=1", "epoch=2", "epoch=3"]
    assert [p.stem for p in checkpoints] == [f"epoch={e}" for e in range(6)]
    expected, parameters = tensors_of(kind())
    for candidate, checkpoint in zip(candidates, checkpoints[1:4], strict=True):
        a = read_candidate_from(candidate, expected, parameters)
        b = read_candidate_from(checkpoint, expected, parameters)
        assert a.name == b.name == candidate.stem
        assert equal(a.parameters, b.parameters)
        assert equal(a.buffers, b.buffers)
        written = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert equal({n: written[n] for n in expected}, whole(b))
    last = read_candidate_from(checkpoints[-1], expected, parameters)
    assert equal(whole(last), {n: t.detach() for n, t in tensors_of(module)[0].items()})


class Own:
    """A class of the user's, with everything that pickle can do to an object."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class OwnList(list):
    pass


class OwnDict(dict):
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_read_beside_hyperparameters_of_any_kind(tmp_path: Path, zipped: bool) -> None:
    state = {**fresh(), "further": nn.Parameter(torch.ones(2)), "half": torch.ones(3).bfloat16()}
    objects = {
        "path": tmp_path,
        "namespace": argparse.Namespace(a=1),
        "numpy": [np.float64(3), np.ones(3)],
        "own": Own([Own(1), OwnList([1, 2]), OwnDict(a=1), {Own(2)}, slice(1)]),
        "function": nn.functional.relu,
        "module": nn.Linear(2, 2),
        "range": range(3),
        "device": torch.device("cpu"),
    }
    content = {"state_dict": state, "hyper_parameters": objects}
    path = saved(tmp_path / "a.ckpt", content, _use_new_zipfile_serialization=zipped)
    assert equal(read_file(path), state)
