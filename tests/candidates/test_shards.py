"""A checkpoint in several files with an index is one candidate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from lightning_twa import average
from lightning_twa.candidates import find_files, read_file, unique_names

KINDS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


def write(folder: Path, state: dict[str, Tensor], kind: str = "safetensors", n: int = 3) -> Path:
    """As ``save_pretrained(max_shard_size=...)``; the index."""
    folder.mkdir(parents=True)
    stem, _, suffix = KINDS[kind].partition(".")
    files = [f"{stem}-{i + 1:05d}-of-{n:05d}.{suffix}" for i in range(n)]
    parts: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for i, (name, tensor) in enumerate(state.items()):
        parts[files[i % n]][name] = tensor.clone()
    for file, part in parts.items():
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return index


def states(n: int = 2) -> list[dict[str, Tensor]]:
    return [Regressor(batchnorm=True).state_dict() for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", ["directory", "index", "a part", "all parts", "files"])
def test_a_checkpoint_is_one_candidate_however_it_is_named(
    tmp_path: Path, kind: str, named: str
) -> None:
    (state,) = states(1)
    index = write(tmp_path / "checkpoint-5", state, kind)
    suffix = KINDS[kind].partition(".")[2]
    item: Any = {
        "directory": index.parent,
        "index": index,
        "a part": sorted(index.parent.glob(f"*.{suffix}"))[1],
        "all parts": str(index.parent / f"*.{suffix}"),
        "files": [*index.parent.glob(f"*.{suffix}"), index],
    }[named]
    assert find_files(item) == [index]
    assert unique_names([index]) == ["checkpoint-5"]
    assert equal(read_file(index), state)


def test_directories_of_a_pattern_are_a_candidate_each(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"checkpoint-{i}", s) for i, s in zip((5, 10), states(), strict=True)]
    whole = tmp_path / "checkpoint-7" / "model.safetensors"
    whole.parent.mkdir()
    save_file(states(1)[0], whole)
    (tmp_path / "checkpoint-8").mkdir()  # of another kind
    found = find_files(str(tmp_path / "checkpoint-*"))
    assert found == [parts[0], whole, parts[1]]
    assert unique_names(found) == ["checkpoint-5", "model", "checkpoint-10"]
    assert equal(average(found[:2]), average([read_file(path) for path in found[:2]]))


def test_the_commands_average_and_inspect_them(tmp_path: Path) -> None:
    first, second = states()
    paths = [write(tmp_path / f"{i}", s).parent for i, s in enumerate((first, second))]
    out = tmp_path / "average.safetensors"
    command = [sys.executable, "-m", "lightning_twa", "average", *map(str, paths), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert equal(load_file(out), average([first, second]))
    assert "2 files, 0 .. 1" in done.stdout


def test_a_run_takes_them_as_candidates(tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    models = [Regressor(batchnorm=False) for _ in range(3)]
    for i, module in enumerate(models):
        write(tmp_path / f"checkpoint-{i}", module.state_dict(), n=2)
    twa = TWACallback(
        start_epoch=0,
        collect=CollectConfig(checkpoints=str(tmp_path / "checkpoint-*")),
    )
    module = Regressor()
    trainer(tmp_path, callbacks=[twa], max_epochs=1).fit(module, loader())
    assert twa.candidate_names == ["checkpoint-0", "checkpoint-1", "checkpoint-2"]
    learned = twa.averaging_weights[:, 0].tolist()
    mixed = average([m.state_dict() for m in models], "weights", weights=learned)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, mixed[name], rtol=1e-5, atol=1e-6)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    index = write(tmp_path / "a", states(1)[0])
    (index.parent / "model-00002-of-00003.safetensors").unlink()
    text = r"model-00002-of-00003\.safetensors is missing.* 3 parts .*\(1 of them missing\)\. Copy"
    for call in (find_files, read_file):
        with pytest.raises(ValueError, match=text):
            call(index)
    twa = TWACallback(start_epoch=0, collect=CollectConfig(checkpoints=[index.parent, index]))
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, callbacks=[twa]).fit(Regressor(batchnorm=True), loader())


def test_a_part_without_its_index_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "a", states(1)[0])
    index.unlink()
    with pytest.raises(ValueError, match=r"-00001-of-.*index is missing .*model\.safetensors\.ind"):
        find_files(str(tmp_path / "a" / "*.safetensors"))


def test_parts_of_different_checkpoints_are_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "a", states(1)[0])
    save_file({"other": torch.ones(1)}, index.parent / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors has no tensor .*different"):
        read_file(index)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no index .*JSONDecodeError.*Restore"),
        ("[]", "no index .*TypeError.*Restore"),
        ("{}", "no index .*KeyError: 'weight_map'.*Restore"),
        ('{"weight_map": [1]}', "no index .*AttributeError.*Restore"),
        ('{"weight_map": {}}', r"lists \[\].*Restore"),
        ('{"weight_map": {"w": "../a.safetensors"}}', r"lists .*no files beside it.*Restore"),
        ('{"weight_map": {"w": 3}}', "no index .*TypeError.*Restore"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str, match: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is )?" + match):
        find_files(tmp_path)


def test_two_checkpoints_in_a_directory_are_told_apart(tmp_path: Path) -> None:
    index = write(tmp_path / "a", states(1)[0])
    of_bin = write(tmp_path / "b", states(1)[0], "bin")
    for path in of_bin.parent.glob("pytorch*"):
        path.rename(index.parent / path.name)
    assert find_files(index.parent) == [index], "safetensors before others"
    (index.parent / "model.safetensors.index.fp16.json").write_text(index.read_text())
    with pytest.raises(ValueError, match=r"several checkpoints, model.*fp16.*Name one"):
        find_files(index.parent)
