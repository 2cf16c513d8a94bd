"""Weights from checkpoint files: tensors must fit the model, under whatever prefix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from helpers.common import Regressor
from helpers.readers import PARAMETERS, equal, fresh, read, refused, saved, tensors_of, whole
from lightning_twa.candidates.readers import read_candidate_from, read_file

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


# --- Names of tensors


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
