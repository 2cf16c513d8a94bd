"""Buffers of every kind, and values that are the same in all candidates, through a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal
from lightning_twa import SolverConfig, StorageConfig, SubspaceConfig, average

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Ss]parse"),  # beta state
    pytest.mark.filterwarnings("ignore:.*could not be written to"),  # older safetensors
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # quantized ones
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def _float8(name: str) -> Tensor:
    return torch.arange(4.0).to(getattr(torch, name))


BUFFERS: dict[str, Any] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "coo integers": lambda: torch.eye(4, dtype=torch.long).to_sparse(),
    "empty coo": lambda: torch.zeros(3, 3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8),
    "float8 e4m3": lambda: _float8("float8_e4m3fn"),
    "float8 e5m2": lambda: _float8("float8_e5m2"),
    "expanded": lambda: torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3),
    "expanded integers": lambda: torch.tensor([[1, 2, 3]]).expand(4, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "strided": lambda: torch.arange(6.0)[::2],
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0),
    "complex64": lambda: torch.full((3,), 1 + 2j, dtype=torch.complex64),
    "complex128": lambda: torch.full((3,), 0.1 + 0.2j, dtype=torch.complex128),
    "bool": lambda: torch.tensor([True, False]),
    "uint16": lambda: torch.arange(3).to(torch.uint16),
    "-inf": lambda: torch.full((3, 3), -torch.inf).triu(1),
    "nan": lambda: torch.full((3,), torch.nan),
    "float64": lambda: torch.full((3,), 0.1, dtype=torch.float64),
    "bfloat16": lambda: torch.full((3,), 0.1, dtype=torch.bfloat16),
}
KINDS: dict[str, dict[str, Any]] = {
    "memory": {"storage": StorageConfig(kind="memory")},
    "files": {"storage": StorageConfig(kind="disk")},
    "validated": {"validate_average": True},
    "uniform": {"solver": SolverConfig(name="uniform")},
}


class Odd(Regressor):
    """Has one buffer more."""

    def __init__(self, make: Any) -> None:
        super().__init__(batchnorm=True)
        self.register_buffer("odd", make())


def twa(start_epoch: int = 4, **kwargs: Any) -> TWACallback:
    return TWACallback(start_epoch, **{"collect": CollectConfig(start=0), **kwargs})


def bits(tensor: Tensor) -> Tensor:
    """What there is of a tensor, bit by bit."""
    if tensor.is_quantized:
        return tensor.int_repr()
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return dense.contiguous().reshape(-1).view(torch.uint8)


def fit(path: Path, callback: TWACallback, module: Any, **kwargs: Any) -> None:
    torch.manual_seed(1)
    nn.init.normal_(module.net[0].weight)
    the_trainer = trainer(path, callbacks=[callback], max_epochs=6, enable_checkpointing=True)
    the_trainer.fit(module, loader(), loader(32, seed=1), **kwargs)
    assert callback.phase == "done"


@pytest.mark.matrix(8)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            n,
            k,
            marks=[]
            if k == "validated" or n in ("coo", "float8 e4m3", "expanded")
            else pytest.mark.long,
        )
        for n in BUFFERS
        for k in KINDS
    ],
)
def test_a_buffer_of_any_kind_stays_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    """In the model, the file, ``average_state_dict`` and a run that goes on from the file."""
    callback, module, make = twa(**KINDS[kind]), Odd(BUFFERS[name]), BUFFERS[name]
    fit(tmp_path, callback, module)
    expected, own = bits(make()), module.odd
    assert (own.dtype, own.layout) == (make().dtype, make().layout)
    assert equal(bits(own), expected)
    saved = torch.load(callback.average_path, weights_only=True)["state_dict"]
    assert equal(bits(saved["odd"]), expected)
    assert equal(bits(callback.average_state_dict()["odd"]), expected)
    if name.startswith("expanded"):
        return  # torch itself copies nothing into it
    again, last = Odd(BUFFERS[name]), tmp_path / "last.ckpt"
    (checkpoint,) = [p for p in tmp_path.rglob("*.ckpt") if "twa" not in p.name]
    checkpoint.rename(last)
    resumed = twa(**KINDS[kind])
    trainer(tmp_path, callbacks=[resumed], max_epochs=6).fit(
        again, loader(), loader(32, seed=1), ckpt_path=last
    )
    assert equal(bits(again.odd), expected)


class Changes(Odd):
    """Its buffer has other values after every epoch, in memory of the same kind."""

    def on_train_epoch_start(self) -> None:
        self.odd = torch.full((1, 3), float(self.current_epoch)).expand(4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_buffer_is_averaged_as_others_are(tmp_path: Path, kind: str) -> None:
    callback, module = twa(**KINDS[kind]), Changes(BUFFERS["expanded"])
    seen = []
    module.on_validation_epoch_start = lambda: seen.append(module.odd[0, 0].item())
    module.on_train_epoch_end = lambda: seen.append(module.odd[0, 0].item())
    fit(tmp_path, callback, module)
    if kind == "uniform":  # the mean of epochs 0 to 5, before the last validation
        assert module.odd.tolist() == [[2.5] * 3] * 4
    raw = [float(epoch) for epoch in range(6)]
    averages = {"validated": [0.0, 0.0, 0.5, 1.0], "uniform": raw[:4]}.get(kind, raw[:4])
    trained = seen[2::2]  # after the sanity check: validated, then trained on
    assert trained[:4] == raw[:4], "raw values came back"
    assert seen[1::2][:4] == averages


# --- equal values


class Equal(Regressor):
    """Some values are the same in all candidates: a whole parameter, and elements of one that is
    trained.
    """

    def __init__(self, dtype: torch.dtype, trained: bool) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.full((5,), 0.1), requires_grad=trained)
        with torch.no_grad():
            self.net[0].weight[:, 2] = 0.1
        self.register_buffer("third", torch.full((3,), 1 / 3))
        self.to(dtype)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0][:, 2] = 0  # no gradient, no momentum
        batch[:] = [t.to(self.third.dtype) for t in batch]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = [t.to(self.third.dtype) for t in batch]
        super().validation_step(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([t.to(self.third.dtype) for t in batch], batch_idx)


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"solver": SolverConfig(name="uniform")},
    "averages": {"collect": CollectConfig(start=0, ema_decays=(0.5, 0.9))},
    "steps": {"collect": CollectConfig(start=0, every_n_train_steps=3)},
    "groups": {"subspace": SubspaceConfig(group_size=2)},
    "mask": {"subspace": SubspaceConfig(parametrization="mask")},
    "simplex": {
        "subspace": SubspaceConfig(basis="candidates", parametrization="simplex"),
        "solver": SolverConfig(lr=0.1),
    },
    "candidates": {
        "subspace": SubspaceConfig(basis="candidates"),
        "solver": SolverConfig(lr=0.1),
    },
    "a block per tensor": {"subspace": SubspaceConfig(blocks="tensor")},
    "files": {"storage": StorageConfig(kind="disk")},
    "validated": {"validate_average": True},
    "16 bits": {"subspace": SubspaceConfig(bits=16)},
    "8 bits": {"subspace": SubspaceConfig(bits=8)},
    "4 bits": {"subspace": SubspaceConfig(bits=4)},
    "4 bits in groups": {"subspace": SubspaceConfig(bits=4, group_size=2)},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.matrix(6)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(
            w,
            d,
            marks=[] if d == torch.float64 or w in ("default", "uniform") else pytest.mark.long,
        )
        for w in WAYS
        for d in DTYPES
    ],
)
def test_what_is_the_same_in_all_candidates_stays_as_it_is(tmp_path, way, dtype) -> None:
    for trained in (False, True):
        callback, module = twa(**WAYS[way]), Equal(dtype, trained)
        fixed = module.fixed.detach().clone()
        column, third = module.net[0].weight[:, 2].detach().clone(), module.third.clone()
        trainer(tmp_path, callbacks=[callback], max_epochs=6).fit(
            module, loader(), loader(32, seed=1)
        )
        assert callback.phase == "done"
        assert equal(bits(module.fixed.detach()), bits(fixed))
        assert equal(bits(module.third), bits(third))
        if "bits" not in way or way == "16 bits":
            assert equal(bits(module.net[0].weight[:, 2].detach()), bits(column))
        found = average(callback)
        assert equal(bits(found["fixed"]), bits(fixed))
        assert equal(bits(found["third"]), bits(third))
        assert equal(bits(found["net.0.weight"][:, 2]), bits(column))


@pytest.mark.parametrize("method", ["uniform", "ema", "weights", "greedy"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128])
@pytest.mark.parametrize("n", [3, 7, 10])
def test_averages_of_state_dicts_keep_what_is_the_same(method, dtype, n) -> None:
    generator = torch.Generator().manual_seed(n)
    fixed = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype)
    drawn = torch.rand(n, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "ema": {"decay": 0.7},
        "weights": {"weights": (drawn / drawn.sum()).tolist()},
        "greedy": {"score": lambda state: 1.0},
    }.get(method, {})
    states = [{"a": fixed.clone(), "b": torch.randn(5, generator=generator)} for _ in range(n)]
    found = average(states, method, **options)
    assert equal(bits(found["a"]), bits(fixed))
    if method == "uniform":
        expected = torch.stack([state["b"].double() for state in states]).mean(dim=0)
        assert torch.allclose(found["b"].double(), expected, rtol=1e-6)
