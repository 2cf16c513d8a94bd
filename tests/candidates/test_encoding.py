"""What is written into a candidate file is read from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from helpers.candidates import names, same, save, small
from lightning_twa.candidates import Candidate, encoding
from lightning_twa.candidates.encoding import encode
from lightning_twa.candidates.files import Reference, read_candidate


def awkward() -> Candidate:
    base = torch.randn(6, 4)
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -0.0, 1e-45])
    return Candidate(
        "step=120",
        {
            "z.weight": base,
            "tied": base,
            "row": base[2],
            "transposed": base.t(),
            "strided": base[::2, 1::2],
            "expanded": torch.tensor([1.5]).expand(3, 2),
            "scalar": torch.tensor(1.25),
            "empty": torch.empty(0, 3),
            "half": torch.randn(3).half(),
            "brain": torch.randn(3).bfloat16(),
            "double": torch.randn(3, dtype=torch.float64),
            "eight": torch.randn(5).to(torch.float8_e4m3fn),
            "special": special,
            "ünïcode \"'\n": torch.randn(1),
            "needs.grad": torch.nn.Parameter(torch.randn(2)),
            "": torch.randn(2),
        },
        {
            "z.weight": torch.zeros(2),
            "flag": torch.tensor(True),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(3, dtype=torch.uint8),
            "short": torch.arange(3, dtype=torch.int16),
            "count": torch.tensor(2**62 + 1),
            "none": torch.empty(0, dtype=torch.int32),
            "fine": torch.tensor([0.1]),
        },
    )


def test_a_round_trip_is_bitwise_and_keeps_the_order(tmp_path: Path) -> None:
    candidate = awkward()
    reference = save(tmp_path, candidate)
    path = tmp_path / reference.file
    content = path.read_bytes()
    assert reference.file == "version_0/step=120.safetensors"
    assert (reference.name, reference.size) == ("step=120", len(content))
    assert reference.digest == hashlib.sha256(content).hexdigest()
    assert names(path.parent) == ["step=120.safetensors"]
    again = read_candidate(tmp_path, Reference.from_state(reference.state_dict()))
    assert again.name == candidate.name
    for before, after in [
        (candidate.parameters, again.parameters),
        (candidate.buffers, again.buffers),
    ]:
        assert list(after) == list(before)
        assert all(same(before[name], after[name]) for name in before)
        assert all(t.data_ptr() % t.element_size() == 0 for t in after.values())
        assert not any(t.requires_grad for t in after.values())


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    candidate = small()
    path = tmp_path / save(tmp_path, candidate).file
    expected = {f"parameters.{k}": t for k, t in candidate.parameters.items()}
    expected["buffers.count"] = torch.tensor(3)
    found = safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    assert all(same(found[k], expected[k]) for k in expected)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {"format": "pt", "format_version": "1", "candidate": "epoch=3"}
        assert file.metadata() == metadata


def test_a_candidate_without_tensors(tmp_path: Path) -> None:
    assert read_candidate(tmp_path, save(tmp_path, Candidate("x", {}, {}))) == Candidate(
        "x", {}, {}
    )


def test_complex_buffers_are_stored_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate("x", {}, {"rope": torch.randn(4, dtype=torch.complex64).conj()})
    if encoding._known(torch.complex64):
        again = read_candidate(tmp_path, save(tmp_path, candidate))
        assert torch.equal(again.buffers["rope"], candidate.buffers["rope"])
    monkeypatch.setattr(encoding, "_known", lambda dtype: dtype != torch.complex64)
    with pytest.raises(TypeError, match=r"'buffers\.rope' has dtype torch\.complex64.*cannot"):
        save(tmp_path, candidate)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()]
)
def test_a_tensor_that_no_file_can_hold_is_named(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(TypeError, match=r"'buffers\.odd' has dtype .* cannot store"):
        save(tmp_path, Candidate("x", {}, {"odd": tensor}))
    assert names(tmp_path / "version_0") == []


def test_at_most_one_tensor_is_copied() -> None:
    base = torch.randn(4, 2**16)
    parts = encode(Candidate("x", {"a": base, "b": base[1], "c": base.t()}, {}))
    next(parts)
    addresses = [torch.frombuffer(part, dtype=torch.uint8).data_ptr() for part in parts]
    assert addresses[:2] == [base.data_ptr(), base[1].data_ptr()]


def test_the_largest_tensor_is_aligned_as_memory_of_torch_is(tmp_path: Path) -> None:
    """The order of sums in a product with it, and so the last bit, may depend on that."""
    for bytes_before in (1, 3):
        tensors = {
            "wide": torch.ones(bytes_before, dtype=torch.float64),
            "large": torch.arange(300.0),
            "small": torch.ones(5, dtype=torch.bool),
        }
        again = read_candidate(tmp_path, save(tmp_path, Candidate(str(bytes_before), tensors, {})))
        assert again.parameters["large"].data_ptr() % 64 == 0
        assert again.parameters["wide"].data_ptr() % 8 == 0
        assert all(torch.equal(t, tensors[n]) for n, t in again.parameters.items())
