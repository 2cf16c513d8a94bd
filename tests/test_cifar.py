"""``examples/cifar.py`` on tiny made-up files in the real format."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import load_script

SCRIPT = Path(__file__).parents[1] / "examples" / "cifar.py"


RESULT = (
    r"^(\w+) on (\w+), (\w+), seed (\d+): test accuracy (\S+) %, NLL (\S+), (\d+) epochs, \d+ s$"
)


TINY = ("--width", "0.0625", "--batch-size", "40", "--epochs", "4")


@pytest.fixture(scope="module")
def cifar() -> Any:
    """The example as a module."""
    return load_script(SCRIPT)


def write(path: Path, labels: list[list[int]], seed: int) -> None:
    """Records with these label bytes, and noise about a gray value that the last of them sets."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 40, (len(labels), 3072), generator=generator)
    pixels = noise + 20 * torch.tensor(labels)[:, -1:] % 200
    records = torch.cat([torch.tensor(labels), pixels], dim=1).to(torch.uint8)
    path.write_bytes(bytes(records.flatten().tolist()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both data sets, 40 images a file."""
    folder = tmp_path_factory.mktemp("cifar")
    ten, hundred = folder / "cifar-10-batches-bin", folder / "cifar-100-binary"
    ten.mkdir()
    hundred.mkdir()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        write(ten / name, [[i % 10] for i in range(40)], seed)
    for seed, name in enumerate(("train.bin", "test.bin")):
        write(hundred / name, [[i % 20, i % 100] for i in range(200)], seed)
    return folder


def only_result(output: str) -> tuple[str, ...]:
    """Model, data set, mode, seed, accuracy, NLL and epochs of the only line of results."""
    # a progress bar ends its line with a carriage return where it is written over
    lines = [line for line in re.split(r"[\r\n]", output) if "test accuracy" in line]
    assert len(lines) == 1, output
    match = re.fullmatch(RESULT.strip("^$"), lines[0])
    assert match is not None, lines[0]
    assert 0 <= float(match[5]) <= 100
    assert math.isfinite(float(match[6]))
    return match.groups()


# --- the whole


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # another mode of the same program; "twa" stays in `make test`
        pytest.param(
            ("--mode", "full"),
            ("vgg16", "cifar10", "full", "0", "4"),
            marks=pytest.mark.long,
        ),
        (
            ("--mode", "twa", "--twa-start", "2", "--twa-epochs", "1", "--seed", "7"),
            ("vgg16", "cifar10", "twa", "7", "3"),
        ),
    ],
    ids=["full", "twa"],
)
def test_script_prints_one_result(
    data: Path, tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    command = [sys.executable, str(SCRIPT), "--data", str(data), *TINY, *arguments]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    *name, _, _, epochs = only_result(result.stdout)
    assert (*name, epochs) == expected
    assert ("TWA" in result.stderr) == ("twa" in arguments)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*GPU available:UserWarning")
def test_held_out_images_and_other_options(
    cifar: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = []

    class Recorded(cifar.TWACallback):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            made.append(self)

    monkeypatch.setattr(cifar, "TWACallback", Recorded)
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(data), *TINY, "--model", "vit", "--dataset", "cifar100"]
    arguments += ["--twa-start", "3", "--twa-epochs", "2", "--collect-start", "0", "--bits", "4"]
    arguments += ["--blocks", "tensor", "--data-for-coefficients", "val"]
    with pytest.warns(UserWarning, match="validation metrics are not held out"):
        cifar.main([*arguments, "--validation-images", "50"])

    *name, _, _, epochs = only_result(capsys.readouterr().out)
    assert (*name, epochs) == ("vit", "cifar100", "twa", "0", "5")
    (twa,) = made
    assert [n for n in twa.candidate_names if "epoch" in n] == ["epoch=0", "epoch=1", "epoch=2"]
    assert len(twa.block_names) > 1
    assert twa.settings.data == "val"
    assert twa.settings.subspace.bits == 4


# --- wrong options and files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "full", "--twa-epochs", "3"], "--twa-epochs needs --mode twa"),
        (["--mode", "full", "--data-for-coefficients", "val"], "--data-for-coefficients needs"),
        (["--twa-start", "1"], "--twa-start 1 is not in 2..200"),
        (["--twa-start", "201"], "--twa-start 201 is not in 2..200"),
        (["--epochs", "0"], "argument --epochs: invalid count value: '0'"),
        (["--bits", "9"], "argument --bits: invalid choice: 9"),
        (["--blocks", "layer"], "argument --blocks: invalid blocks value: 'layer'"),
        (["--width", "0"], "--width 0.0 is not a number above 0"),
        (["--validation-images", "200"], "--validation-images must be in 0..199"),
        (["--data-for-coefficients", "val"], "--validation-images must be in 1..199"),
        (["--devices", "-1"], "argument --devices: invalid count value: '-1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_the_program(
    cifar: Any, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cifar.main(["--data", str(data), *arguments])
    assert message in capsys.readouterr().err


def test_a_missing_file_ends_the_program(
    cifar: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(1, 5):
        write(tmp_path / f"data_batch_{i}.bin", [[1]], i)
    with pytest.raises(SystemExit, match=r"^2$"):
        cifar.main(["--data", str(tmp_path)])
    message = capsys.readouterr().err
    assert f"error: {tmp_path / 'data_batch_5.bin'} is missing. Get the binary version" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
    assert "(cifar-10-batches-bin)" in message


@pytest.mark.parametrize(
    ("dataset", "size", "problem"),
    [
        ("cifar10", 2 * 3073 - 1, "has 6145 bytes, not whole records of 3073"),
        ("cifar10", 0, "has 0 bytes, not whole records of 3073"),
        ("cifar100", 3073, "has 3073 bytes, not whole records of 3074"),
    ],
)
def test_truncated_files_are_refused(
    cifar: Any, tmp_path: Path, dataset: str, size: int, problem: str
) -> None:
    path = tmp_path / "part.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"part.bin {problem}. Get the binary version"):
        cifar.read([path], cifar.SOURCES[dataset])


def test_labels_of_another_data_set_are_refused(cifar: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [[3], [10]], 0)
    with pytest.raises(ValueError, match=r"a\.bin has the label 10"):
        cifar.read([tmp_path / "a.bin"], cifar.SOURCES["cifar10"])


def test_folder_itself_or_the_one_around_it(cifar: Any, data: Path) -> None:
    source = cifar.SOURCES["cifar10"]
    train, test = cifar.load(data / "cifar-10-batches-bin", source)
    assert (len(train), len(test)) == (200, 40)
    assert train.labels.tolist() == 5 * (4 * list(range(10)))
    again, _ = cifar.load(data, source)
    assert torch.equal(train.images, again.images)
