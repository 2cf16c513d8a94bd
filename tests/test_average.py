"""Averages that are not learned, of candidates: ``average()``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from helpers.common import Regressor, loader, trainer
from helpers.plain import CollectConfig, TWACallback
from helpers.resume import equal, state
from lightning_twa import average

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to")


def members(n: int = 5, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [
        {
            "w": torch.randn(4, 3, dtype=dtype),
            "b": torch.randn(3, dtype=torch.bfloat16),
            "count": torch.tensor(i),
        }
        for i in range(n)
    ]


def reference(ms: list[dict[str, Tensor]], factors: Any) -> dict[str, Tensor]:
    """In float64 with numpy."""
    result: dict[str, Tensor] = {"count": ms[-1]["count"]}
    for key in ("w", "b"):
        stacked = np.stack([m[key].double().numpy() for m in ms])
        mixed = np.tensordot(np.asarray(factors), stacked, axes=1)
        result[key] = torch.from_numpy(mixed).to(ms[0][key].dtype)
    return {key: result[key] for key in ms[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_weights(dtype) -> None:
    ms = members(5, dtype)
    factors = torch.softmax(torch.randn(5, dtype=torch.float64), 0)
    powers = 0.7 ** np.arange(4, -1, -1)
    cases = [
        (average(ms), reference(ms, [0.2] * 5)),
        (average(ms, last=2), reference(ms[-2:], [0.5] * 2)),
        (average(ms, last=9), reference(ms, [0.2] * 5)),
        (average(ms, "ema", decay=0.7), reference(ms, powers / powers.sum())),
        (average(ms, "weights", weights=factors), reference(ms, factors.numpy())),
        (average(ms[:1]), ms[0]),
    ]
    for found, expected in cases:
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_decay_curve_is_that_of_a_learning_rate(n) -> None:
    """Merging checkpoints of plain gradient descent weights its updates by the curve."""
    generator = torch.Generator().manual_seed(n)
    fine = 1000  # updates between two checkpoints
    updates = torch.randn(max(n - 1, 1) * fine, 3, generator=generator, dtype=torch.float64)
    path = torch.cat([torch.zeros(1, 3, dtype=torch.float64), updates.cumsum(0)])
    if n > 1:  # all updates of an interval count alike: by the mean of the curve there
        u = (torch.arange((n - 1) * fine, dtype=torch.float64) + 0.5) / ((n - 1) * fine)
        rate = (1 - u.sqrt()).view(n - 1, fine).mean(1)
        expected = (rate[:, None] * updates.view(n - 1, fine, 3).sum(1)).sum(0)
    else:
        expected = path[0]
    merged = average([{"w": path[i * fine]} for i in range(n)], "wsm")["w"]
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-3)


def stock(ms: list[dict[str, Tensor]], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    """By arXiv 2403.19522, in float64, from the angles of pairs."""
    result = {"count": ms[-1]["count"]}
    n = len(ms)
    for key in ("w", "b"):
        ways = [(m[key] - anchor[key]).double().reshape(-1) for m in ms]
        pairs = [(a, b) for i, a in enumerate(ways) for b in ways[i + 1 :]]
        cosine = sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)
        t = n * cosine / (1 + (n - 1) * cosine)
        mean = torch.stack([m[key].double() for m in ms]).mean(0)
        result[key] = (t * mean + (1 - t) * anchor[key].double()).to(anchor[key].dtype)
    return result


@pytest.mark.parametrize("n", [2, 3, 6])
def test_model_stock_is_the_paper_s(tmp_path, n) -> None:
    anchor, *others = members(n + 1)
    common = {"w": torch.ones(4, 3), "b": torch.ones(3), "count": 0}
    ms = [
        {k: (anchor[k] + common[k] + 0.5 * (m[k] - anchor[k])).to(anchor[k]) for k in ("w", "b")}
        for m in others
    ]
    ms = [{**m, "count": o["count"]} for m, o in zip(ms, others, strict=True)]
    expected = stock(ms, anchor)
    torch.save(anchor, tmp_path / "anchor.pt")
    for start in (anchor, str(tmp_path / "anchor.pt"), tmp_path / "anchor.pt"):
        found = average(ms, "model_stock", anchor=start)
        for key in ("w", "b", "count"):
            rtol = 1e-2 if found[key].dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found[key], expected[key], rtol=rtol, atol=rtol / 10)
    same = average([ms[0]] * n, "model_stock", anchor=anchor)
    torch.testing.assert_close(same["w"], ms[0]["w"])
    still = average([anchor] * n, "model_stock", anchor=anchor)
    assert torch.equal(still["w"], anchor["w"])
    opposite = [{**anchor, "w": anchor["w"] + sign} for sign in (1.0, -1.0)]
    torch.testing.assert_close(average(opposite, "model_stock", anchor=anchor)["w"], anchor["w"])


def test_model_stock_needs_an_anchor_and_two_models(tmp_path) -> None:
    ms = members(3)
    with pytest.raises(ValueError, match=r"method='model_stock'\) needs anchor"):
        average(ms, "model_stock")
    with pytest.raises(ValueError, match="two or more, but there is 1"):
        average(ms[:1], "model_stock", anchor=ms[1])
    with pytest.raises(ValueError, match=r"method='uniform'\) does not use anchor"):
        average(ms, anchor=ms[0])
    for i in range(2):
        torch.save(ms[i], tmp_path / f"{i}.pt")
    with pytest.raises(ValueError, match="names 2 files"):
        average(ms, "model_stock", anchor=str(tmp_path / "*.pt"))
    with pytest.raises(ValueError, match="anchor"):
        average(ms, "model_stock", anchor={"w": torch.ones(4, 3)})


def test_candidates_are_not_changed() -> None:
    ms = members()
    copies = [{k: t.clone() for k, t in m.items()} for m in ms]
    for tensor in average(ms, last=1).values():
        tensor.zero_()
    average(ms)
    assert equal(ms, copies)


def test_files_and_a_finished_callback_give_the_same(tmp_path) -> None:
    twa = TWACallback(4, collect=CollectConfig(start=0))

    class Save(L.Callback):
        def on_train_epoch_end(self, t: Any, pl_module: Any) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{t.current_epoch}.pt")

    module = Regressor(batchnorm=True)
    trainer(tmp_path, callbacks=[twa, Save()]).fit(module, loader())
    files = average([tmp_path / f"{i}.pt" for i in range(4)])
    own = average(twa)
    assert own.keys() == files.keys() == module.state_dict().keys()
    assert all(torch.equal(own[key], files[key]) for key in own)
    learned = average(twa, "weights", weights=twa.averaging_weights[:, 0])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(learned[name], parameter.detach(), rtol=1e-5, atol=1e-5)


def test_the_greedy_soup_is_the_paper_s() -> None:
    """Against algorithm 1 written down as it stands, also where averages are equally good."""
    for digits in [9, -1] * 10:
        ms = members(6)
        target = torch.randn(4, 3)

        def score(s: dict[str, Tensor], target: Tensor = target) -> float:
            return round(-float((s["w"] - target).square().sum()), digits)  # noqa: B023

        order = sorted(ms, key=score, reverse=True)
        soup: list[dict[str, Tensor]] = []
        for m in order:
            mean = {"w": torch.stack([x["w"] for x in [*soup, m]]).double().mean(0).float()}
            old = torch.stack([x["w"] for x in soup]).double().mean(0).float() if soup else None
            if old is None or score(mean) >= score({"w": old}):
                soup.append(m)
        expected = torch.stack([x["w"] for x in soup]).double().mean(0).float()
        found = average(ms, "greedy", score=score)
        torch.testing.assert_close(found["w"], expected)
        assert score(found) >= score(order[0])


def test_the_greedy_soup_by_validation_of_a_module(tmp_path) -> None:
    module = Regressor(batchnorm=True)
    before = state(module)
    ms = []
    for seed in range(4):
        other = Regressor(batchnorm=True)
        trainer(tmp_path, max_epochs=seed + 1).fit(other, loader(seed=seed))
        ms.append(other.state_dict())
    validator = trainer(tmp_path)
    arguments = {"module": module, "trainer": validator, "dataloaders": loader(32, seed=9)}
    found = average(ms, "greedy", monitor="val_loss", **arguments)

    def loss(s: dict[str, Tensor]) -> float:
        probe = Regressor(batchnorm=True)
        probe.load_state_dict(s)
        (metrics,) = validator.validate(probe, loader(32, seed=9), verbose=False)
        return metrics["val_loss"]

    assert loss(found) <= min(loss(m) for m in ms) + 1e-6
    assert equal(state(module), before)
    expected = average(ms, "greedy", score=lambda s: -loss(s))
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(ValueError, match="monitor='acc' is no metric"):
        average(ms, "greedy", monitor="acc", **arguments)
    assert equal(state(module), before)


def test_tied_parameters_are_loaded_for_validation(tmp_path) -> None:
    class Tied(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.Linear(1, 1))
            self.net[3].bias = self.net[2].bias

    twa = TWACallback(4, collect=CollectConfig(start=2))
    trainer(tmp_path, callbacks=[twa]).fit(Tied(), loader())
    seen = []

    class Look(Tied):
        def on_validation_start(self) -> None:
            seen.append(self.net[3].bias.detach().clone())

    arguments = {"module": Look(), "trainer": trainer(tmp_path), "dataloaders": loader(32)}
    average(twa, "greedy", monitor="val_loss", **arguments)
    expected = [c.parameters["net.2.bias"] for c in twa.candidates]
    assert all(torch.equal(s, e) for s, e in zip(seen, expected, strict=False))

    found, module = average(twa), Tied()
    module.load_state_dict(found)  # strict: both names of the bias are in it
    torch.testing.assert_close(found["net.3.bias"], torch.stack(expected).mean(0))
    assert torch.equal(module.net[2].bias, found["net.2.bias"])


BAD = [
    ({"method": "median"}, "Invalid method='median'"),
    ({"method": "ema"}, "needs decay"),
    ({"method": "ema", "decay": 1.0}, "Invalid decay=1.0"),
    ({"decay": 0.5}, r"method='uniform'\) does not use decay=0.5"),
    ({"method": "weights"}, "needs weights"),
    ({"method": "weights", "weights": [1.0]}, "There are 3 candidates"),
    ({"last": 0}, "Invalid last=0"),
    ({"score": float}, "does not use score"),
    ({"method": "greedy"}, r"needs a score\(state_dict\) function"),
    ({"method": "greedy", "score": lambda s: float("nan")}, "not a number"),
]


def test_weights_that_make_no_average_are_used_with_a_warning() -> None:
    ms = members(2)
    with pytest.warns(UserWarning, match=r"^The weights sum to 2, not to 1"):
        found = average(ms, "weights", weights=[1.0, 1.0])
    torch.testing.assert_close(found["w"], ms[0]["w"] + ms[1]["w"])


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        average(members(3), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(4, 4)}, r"Candidate 1: tensor 'w' is \(4, 4\)"),
        ({"w": torch.ones(4, 3).double()}, "torch.float64, but in Candidate 0"),
        ({"w": torch.full((4, 3), float("inf"))}, "Candidate 1, tensor 'w'"),
        ({"more": torch.ones(1)}, "Candidate 1 has tensor 'more', but Candidate 0 has not"),
    ],
)
def test_candidates_that_differ(change, message) -> None:
    ms = members(3)
    ms[1].update(change)
    with pytest.raises(ValueError, match=message):
        average(ms)


def test_a_callback_without_candidates() -> None:
    with pytest.raises(ValueError, match="has no candidates"):
        average(TWACallback(4))


def test_paths(tmp_path) -> None:
    ms = members(2)
    for i, m in enumerate(ms):
        torch.save(m, tmp_path / f"{i}.pt")
    assert equal(average(str(tmp_path / "*.pt")), average(ms))
    with pytest.raises(ValueError, match="matches no file"):
        average(Path(tmp_path / "*.ckpt"))


def test_averages_among_ordinary_weights_are_named(tmp_path) -> None:
    """A pattern takes the checkpoints of a run, and of its average; of one kind is fine."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    twa = TWACallback(start_epoch=4, save_average=True)
    trainer(tmp_path, callbacks=[twa, saver], enable_checkpointing=True).fit(Regressor(), loader())
    message = "epoch=5.ckpt and 1 more of 7 files hold the average that a run ended with"
    with pytest.warns(UserWarning, match=message):
        average(str(tmp_path / "*.ckpt"))
    average([tmp_path / f"epoch={epoch}.ckpt" for epoch in range(5)])
    average([tmp_path / "twa.ckpt", tmp_path / "epoch=5.ckpt"])
    average([tmp_path / "twa.ckpt"])
    soup = CollectConfig(checkpoints=str(tmp_path / "*.ckpt"))
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, callbacks=[TWACallback(start_epoch=0, collect=soup)], max_epochs=1).fit(
            Regressor(), loader()
        )
