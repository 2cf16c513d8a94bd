"""Weights from checkpoint files: what is found, read and refused, and under which names."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import Regressor, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lightning_twa import CollectConfig, StorageConfig, TWACallback
from lightning_twa.candidates import Candidate, persistent_buffers
from lightning_twa.candidates.files import make_directory, write_candidate
from lightning_twa.candidates.readers import (
    find_files,
    read_candidate_from,
    read_file,
    unique_names,
)

LINKS = pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")


def touch(root: Path, *names: str) -> list[Path]:
    """Empty files, which are found but not read."""
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def fresh(**changes: Tensor) -> dict[str, Tensor]:
    """The state of a small model, with two parameters and two buffers."""
    state = {
        "net.0.weight": torch.randn(3, 2, dtype=torch.float64),
        "net.0.bias": torch.randn(3, dtype=torch.float64),
        "net.1.running_mean": torch.randn(3, dtype=torch.float64),
        "net.1.count": torch.randint(1, 99, ()),
    }
    return {**state, **changes}


PARAMETERS = ("net.0.weight", "net.0.bias")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def saved(path: Path, content: Any, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def read(path: Path, state: dict[str, Tensor], parameters: Any = PARAMETERS) -> Candidate:
    """Read a file for a model with other values of a state; only the model's names count."""
    expected = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return read_candidate_from(path, expected, parameters)


def whole(candidate: Candidate) -> dict[str, Tensor]:
    return {**candidate.parameters, **candidate.buffers}


def refused(path: Path, state: dict[str, Tensor], match: str, parameters: Any = PARAMETERS) -> None:
    """Reading is an error that names the file and matches."""
    with pytest.raises(ValueError, match=re.escape(path.name) + ".*" + match):
        read(path, state, parameters)


# --- Files


def test_a_pattern_has_natural_order(tmp_path: Path) -> None:
    names = ["epoch=2.ckpt", "epoch=10.ckpt", "epoch=10-v1.ckpt", "epoch=9-step=90.ckpt", "a.pt"]
    touch(tmp_path, *names, "epoch=3.txt")
    found = find_files(str(tmp_path / "epoch*.ckpt"))
    assert [p.name for p in found] == [
        "epoch=2.ckpt",
        "epoch=9-step=90.ckpt",
        "epoch=10-v1.ckpt",
        "epoch=10.ckpt",
    ]


def test_directories_of_a_pattern_have_natural_order_and_are_no_files(tmp_path: Path) -> None:
    touch(tmp_path, "run_10/last.ckpt", "run_9/last.ckpt", "run_9/x/y/best.ckpt", "last.ckpt")
    found = find_files(f"{tmp_path}/**/*t*")
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "last.ckpt",
        "run_9/last.ckpt",
        "run_9/x/y/best.ckpt",
        "run_10/last.ckpt",
    ]


def test_equal_numbers_have_an_order(tmp_path: Path) -> None:
    touch(tmp_path, "1.pt", "01.pt", "001.pt")
    assert [p.name for p in find_files(tmp_path / "*.pt")] == ["001.pt", "01.pt", "1.pt"]


def test_items_keep_their_order_and_files_come_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.ckpt", "b.pt", "c.pth", "d.bin", "e.safetensors", "f.CKPT")
    items = [tmp_path / "c.pth", str(tmp_path / "*.ckpt"), tmp_path / "x/../c.pth", tmp_path / "*"]
    (tmp_path / "x").mkdir()
    found = find_files(items)
    assert [p.name for p in found] == [
        "c.pth",
        "a.ckpt",
        "b.pt",
        "d.bin",
        "e.safetensors",
        "f.CKPT",
    ]


@LINKS
def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (file,) = touch(tmp_path, "epoch=3.ckpt")
    (tmp_path / "last.ckpt").symlink_to(file)
    assert find_files(tmp_path / "*.ckpt") == [file]
    assert find_files([tmp_path / "last.ckpt", file]) == [tmp_path / "last.ckpt"]
    file.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt does not exist"):
        find_files(tmp_path / "last.ckpt")


@pytest.mark.parametrize("item", ["~/a.ckpt", "~/*.ckpt", Path("~/a.ckpt")])
def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: Any, item: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = touch(tmp_path, "a.ckpt")
    assert find_files(item) == paths


def test_an_existing_path_is_no_pattern(tmp_path: Path) -> None:
    file, _ = touch(tmp_path, "a[1].ckpt", "a1.ckpt")
    assert find_files(file) == [file]
    (inside,) = touch(tmp_path, "run[2]/epoch=1.safetensors")
    assert find_files(inside.parent) == [inside]


def test_a_directory_means_its_candidates(tmp_path: Path) -> None:
    names = [f"{name}.safetensors" for name in ("epoch=2", "epoch=10", "step=3", "step=20")]
    expected = touch(tmp_path, *names)
    touch(tmp_path, "frozen.safetensors", "epoch=1.ckpt", "x.tmp", "deeper/epoch=1.safetensors")
    assert find_files(tmp_path) == expected


@pytest.mark.parametrize("inside", [True, False])
def test_candidates_of_a_sharded_run_are_refused(tmp_path: Path, inside: bool) -> None:
    candidate = Candidate("epoch=1", {"w": torch.randn(2)}, {})
    part = tmp_path / "version_0" / "rank_1_of_2"
    part.mkdir(parents=True)
    write_candidate(tmp_path, part, candidate)
    with pytest.raises(ValueError, match=r"sharded parameters.*gathered on one process"):
        find_files(part if inside else part.parent)
    with pytest.raises(ValueError, match=r"epoch=1\.safetensors holds a part of the weights"):
        read_file(part / "epoch=1.safetensors")


def test_a_directory_without_candidates_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "frozen.safetensors", "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"holds no candidates.*pattern \(\*\.ckpt\)") as caught:
        find_files([tmp_path])
    assert str(tmp_path) in str(caught.value)
    touch(tmp_path, "version_2/epoch=1.safetensors", "version_10/epoch=1.safetensors", "x/a.ckpt")
    with pytest.raises(ValueError, match=r"of 2 run\(s\).*such as .*version_10\.$"):
        find_files(tmp_path)


def test_a_sharded_checkpoint_is_refused_and_not_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "epoch=1.ckpt/.metadata", "epoch=1.ckpt/__0_0.distcp", "epoch=2.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt is a directory.*gathered"):
        find_files(tmp_path / "*.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt holds no candidates.*sharded .*gathered"):
        find_files(tmp_path / "epoch=1.ckpt")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt is a directory"):
        read_file(tmp_path / "epoch=1.ckpt")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"a.ckpt"


@pytest.mark.parametrize("item", [3, None, b"a.ckpt", "", BytesPath(), ["a.ckpt"]])
def test_an_item_that_is_no_path_is_refused(item: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoints has the item .*a str or a Path") as caught:
        find_files([item])
    assert repr(item) in str(caught.value)


@pytest.mark.parametrize("items", [[], (), 3, None, b"a.ckpt", {"a.ckpt"}, iter(["a.ckpt"])])
def test_what_is_no_list_of_items_is_refused(items: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoints is .*Give a path, a pattern") as caught:
        find_files(items)
    assert repr(items) in str(caught.value)


def test_a_pattern_without_files_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.ckpt", "folder/b.ckpt")
    for pattern in ("*.pt", "f*", "missing/*.ckpt", "b?.ckpt", "[xy].ckpt"):
        with pytest.raises(ValueError, match=re.escape(pattern) + "' matches no file"):
            find_files([tmp_path / "a.ckpt", tmp_path / pattern])
    with pytest.raises(ValueError, match=r"b\.ckpt does not exist, or is no regular"):
        find_files([tmp_path / "a.ckpt", tmp_path / "b.ckpt"])
    with pytest.raises(ValueError, match=r"b\.ckpt does not exist, or is no regular"):
        read_file(tmp_path / "b.ckpt")


@pytest.mark.parametrize("item", ["a.txt", "*", "none"])
def test_other_suffixes_are_refused(tmp_path: Path, item: str) -> None:
    touch(tmp_path, "a.txt", "none")
    with pytest.raises(ValueError, match=r"(a\.txt|none) has the suffix .*\.ckpt, \.pt, \.pth"):
        find_files(tmp_path / item)
    with pytest.raises(ValueError, match=r"a\.txt has the suffix '\.txt'"):
        read_file(tmp_path / "a.txt")


# --- Names of candidates


def test_names_are_stems_where_these_are_unique() -> None:
    paths = ["run_1/last.ckpt", "run_2/last.ckpt", "run_2/epoch=3.ckpt", "best.v1.pt"]
    expected = ["run_1/last", "run_2/last", "epoch=3", "best.v1"]
    assert unique_names([Path(path) for path in paths]) == expected
    assert unique_names([]) == []


def test_names_go_as_far_up_as_needed() -> None:
    paths = [Path("x/1/a/last.ckpt"), Path("x/2/a/last.ckpt"), Path("x/2/b/last.ckpt")]
    assert unique_names(paths) == ["1/a/last", "2/a/last", "b/last"]


def test_names_of_a_file_here_and_one_below(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = unique_names([Path("last.ckpt"), Path("run/last.ckpt"), tmp_path / "run" / "x.pt"])
    assert names == [f"{tmp_path.name}/last", "run/last", "x"]


def test_names_keep_the_suffix_where_only_it_differs() -> None:
    paths = [Path("a/last.ckpt"), Path("a/last.pt"), Path("b/other.pt")]
    assert unique_names(paths) == ["last.ckpt", "last.pt", "other"]
    paths = [Path("last.ckpt"), Path("last.pt"), Path("x/last.ckpt.pt"), Path("y/last.pt")]
    assert len(set(unique_names(paths))) == 4


def test_a_path_given_twice_has_no_name() -> None:
    with pytest.raises(ValueError, match=r"a.last\.ckpt is given twice"):
        unique_names([Path("a/last.ckpt"), Path("b.ckpt"), Path("a/last.ckpt")])


# --- Content

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
        ({"w": torch.ones(2).to_sparse()}, r"'w' is a Tensor on cpu with layout torch\.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, r"'w' is a Tensor on meta .*all its values"),
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
    match = r"(?:'w' is a DTensor.*gathered on one process|Unsupported global.*DTensor)"
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
def test_python_objects_are_never_loaded(
    tmp_path: Path, monkeypatch: Any, zipped: bool, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "made"
    content = {"state_dict": fresh(), "hparams": Hostile(target)}
    path = saved(tmp_path / "a.ckpt", content, _use_new_zipfile_serialization=zipped)
    refused(path, fresh(), r"holds Python objects.*GLOBAL.*mkdir.*save its state_dict alone")
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
    damaged = {"empty": b"", "text": b"not weights at all", "truncated": data[:-30]}
    path.write_bytes(damaged.get(how, b"PK\x03\x04\xff\xff\xff\xff" + data[8:40]))
    match = "or is damaged" if suffix == ".ckpt" else "is no safetensors file.*Restore it"
    refused(path, fresh(), match)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    save_file(fresh(), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", fresh(), "or is damaged")
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


class Frozen(Regressor):
    """Its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__(batchnorm=True)
        self.net[0].requires_grad_(False)


def tensors_of(module: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    parameters = dict(module.named_parameters())
    return {**parameters, **persistent_buffers(module)}, set(parameters)


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
    checkpoints = find_files(tmp_path / "ck" / "*.ckpt")
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


# --- Names of tensors

RENAMES = {
    "module.": lambda n: f"module.{n}",
    "_orig_mod.": lambda n: f"_orig_mod.{n}",
    "model.": lambda n: f"model.{n}",
    "_orig_mod.module.": lambda n: f"_orig_mod.module.{n}",
    "module._orig_mod.model.": lambda n: f"module._orig_mod.model.{n}",
    "model._orig_mod.": lambda n: f"model._orig_mod.{n}",
    "compiled submodule": lambda n: n.replace("net.", "net._orig_mod."),
    "compiled layer": lambda n: n.replace("net.0.", "net.0._orig_mod."),
    "both": lambda n: f"model.{n.replace('net.', 'net._orig_mod.module.')}",
}


@pytest.mark.parametrize("wrapped", ["file", "model"])
@pytest.mark.parametrize("rename", RENAMES)
def test_wrappers_change_names(tmp_path: Path, rename: str, wrapped: str) -> None:
    state = fresh()
    other = {RENAMES[rename](name): tensor for name, tensor in state.items()}
    parameters = {RENAMES[rename](name) for name in PARAMETERS}
    if wrapped == "file":
        assert equal(whole(read(saved(tmp_path / "a.pt", other), state)), state)
    else:
        assert equal(whole(read(saved(tmp_path / "a.pt", state), other, parameters)), other)


@pytest.mark.parametrize(("file", "model"), [("model.", "module."), ("module.", "_orig_mod.")])
def test_one_wrapper_for_another(tmp_path: Path, file: str, model: str) -> None:
    state = fresh()
    path = saved(tmp_path / "a.pt", {file + name: tensor for name, tensor in state.items()})
    expected = {model + name: tensor for name, tensor in state.items()}
    candidate = read(path, expected, {model + name for name in PARAMETERS})
    assert equal(whole(candidate), expected)


def test_a_compiled_model_is_read_into_a_plain_one_and_back(tmp_path: Path) -> None:
    plain, other = Regressor(batchnorm=True), Regressor(batchnorm=True)
    inner = torch.compile(other.net, backend="eager")
    compiled = torch.compile(nn.Sequential(inner), backend="eager")
    reference = nn.Sequential(plain.net)
    path = saved(tmp_path / "compiled.pt", compiled.state_dict())
    candidate = read_candidate_from(path, *tensors_of(reference))
    reference.load_state_dict(whole(candidate))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True)
    )
    path = saved(tmp_path / "plain.pt", reference.state_dict())
    compiled.load_state_dict(whole(read_candidate_from(path, *tensors_of(compiled))))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_a_model_may_have_such_names_itself(tmp_path: Path, prefix: str) -> None:
    names = ["w", "model.w", "module.v", "model.module.v", "module"]
    state = {name: torch.randn(3, dtype=torch.float64) for name in names}
    path = saved(tmp_path / "a.pt", {prefix + name: tensor for name, tensor in state.items()})
    assert equal(whole(read(path, state, names)), state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_that_differ_by_a_wrapper_alone_are_kept_apart(tmp_path: Path, prefix: str) -> None:
    state = {name: torch.randn(3, dtype=torch.float64) for name in ("w", "module.w")}
    path = saved(tmp_path / "a.pt", {prefix + name: tensor for name, tensor in state.items()})
    assert equal(whole(read(path, state, state)), state)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.model."])
def test_two_ways_to_read_the_names_are_ambiguous(tmp_path: Path, prefix: str) -> None:
    state = fresh()
    second = {prefix + name: tensor.clone() for name, tensor in state.items()}
    path = saved(tmp_path / "a.pt", {**state, **second})
    assert equal(whole(read(path, state)), state), "the same values"
    second[f"{prefix}net.0.bias"] += 1
    path = saved(tmp_path / "b.pt", {**state, **second})
    match = rf"is ambiguous.*'net\.0\.bias' .*'net\.0\.bias' or '{re.escape(prefix)}net\.0\.bias'"
    refused(path, state, match)


def test_one_tensor_under_two_wrapped_names_is_ambiguous(tmp_path: Path) -> None:
    state = {"net.w": torch.randn(3), "net.v": torch.randn(3)}
    file = {
        "net._orig_mod.w": state["net.w"],
        "module.net.w": torch.randn(3),
        "net.v": state["net.v"],
    }
    refused(
        saved(tmp_path / "a.pt", file), state, r"could be 'net\._orig_mod\.w' or 'module\.", state
    )


# --- What does not fit


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    state = fresh()
    file = {f"model.{name}": state[name] for name in PARAMETERS}
    path = saved(tmp_path / "a.pt", file)
    refused(
        path, state, r"no tensor 'net\.1\.running_mean' \(and 1 more\).*\['model\.net\.0\.weigh"
    )
    file["model.net.1.running_mean"] = state["net.1.running_mean"]
    refused(saved(path, file), state, r"no tensor 'net\.1\.count', which the model has")
    refused(saved(path, {"x": torch.ones(2)}), state, r"'net\.0\.weight' \(and 3 more\)")
    save_file({}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", state, r"'net\.0\.weight' \(and 3 more\).*it holds \[\]")


def test_shapes_must_fit(tmp_path: Path) -> None:
    state = fresh()
    file = {f"module.{name}": tensor for name, tensor in state.items()}
    path = saved(tmp_path / "a.pt", {**file, "module.net.0.bias": torch.randn(4)})
    refused(path, state, r"'net\.0\.bias' with shape \(4,\), but the model's has \(3,\)\. Give")
    file |= {"module.net.0.bias": torch.randn(4), "module.net.1.count": torch.ones(1)}
    refused(saved(path, file), state, r"shape \(4,\), .* has \(3,\) \(and 1 more\)")


@pytest.mark.parametrize("name", fresh())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_dtypes_must_be_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state = fresh()
    path = saved(tmp_path / "a.pt", {**state, name: state[name].to(dtype)})
    match = rf"'{re.escape(name)}' in {dtype}, but the model's is in {state[name].dtype}\. Conv"
    refused(path, state, match)


def test_tensors_of_other_dtypes_are_counted(tmp_path: Path) -> None:
    state = fresh()
    path = saved(tmp_path / "a.pt", {name: tensor.float() for name, tensor in state.items()})
    refused(path, state, r"in torch\.float32, .* in torch\.float64 \(and 3 more\)")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_parameters_must_be_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2).to(dtype)
    state = fresh(**{"net.0.weight": weight})
    path = saved(tmp_path / "a.pt", state)
    kept = read(path, state).parameters["net.0.weight"]
    assert torch.equal(kept.double(), weight.double())
    broken = weight.float()
    broken[1, 1] = value
    path = saved(path, {**state, "net.0.weight": broken.to(dtype)})
    refused(path, state, r"'net\.0\.weight' holds 1 NaN or infinite value")


def test_buffers_may_be_infinite(tmp_path: Path) -> None:
    state = fresh(**{"net.1.running_mean": torch.tensor([0.0, -torch.inf, 1.0])})
    assert equal(whole(read(saved(tmp_path / "a.pt", state), state)), state)


def test_extra_tensors_are_refused(tmp_path: Path) -> None:
    state = fresh()
    path = saved(tmp_path / "a.ckpt", {"state_dict": {**state, "loss.weight": torch.randn(3)}})
    refused(path, state, r"holds tensor 'loss\.weight', which the model does not have\. Give")
    file = {**state, "b": torch.randn(3), "a": state["net.0.bias"].float()}
    refused(saved(path, file), state, r"holds tensor 'a' \(and 1 more\)")
    save_file(file, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", state, r"holds tensor 'a' \(and 1 more\)")


class Tied(nn.Module):
    """Its output layer has the weight of its input layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.decoder = nn.Linear(3, 3, dtype=torch.float64)
        self.decoder.weight = self.encoder.weight


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("shared", [True, False])
def test_further_names_of_tied_weights_are_no_extra_tensors(
    tmp_path: Path, shared: bool, prefix: str
) -> None:
    module = Tied()
    state = {prefix + n: t if shared else t.clone() for n, t in module.state_dict().items()}
    path = saved(tmp_path / "a.pt", state)
    assert len(read_file(path)) == 3
    candidate = read_candidate_from(path, *tensors_of(Tied()))
    assert equal(candidate.parameters, {n: p.detach() for n, p in module.named_parameters()})


def test_save_model_of_safetensors_keeps_one_name_of_tied_weights(tmp_path: Path) -> None:
    module = Tied()
    path = tmp_path / "a.safetensors"
    save_model(module, str(path))
    assert equal(dict(sorted(read_file(path).items())), dict(sorted(module.state_dict().items())))
    candidate = read_candidate_from(path, *tensors_of(Tied()))
    assert equal(candidate.parameters, {n: p.detach() for n, p in module.named_parameters()})


def test_parameters_that_are_no_floats_are_left_out(tmp_path: Path) -> None:
    state = fresh(codes=torch.randint(0, 9, (4,)))
    rest = {name: tensor for name, tensor in state.items() if name != "codes"}
    names = (*PARAMETERS, "codes")
    for content in (state, rest):
        path = saved(tmp_path / "a.pt", content)
        assert equal(whole(read(path, state, names)), rest)
    assert equal(whole(read(saved(path, state), state)), {**state})
