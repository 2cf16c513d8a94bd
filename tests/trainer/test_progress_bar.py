"""Progress bars show where the run is, and what it says stands above them."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning_utilities.core import rank_zero

import lightning_twa
from helpers.beside import beside, plain, twa
from helpers.common import Regressor, loader, trainer, weights
from helpers.screen import terminal
from lightning_twa.machine import warn
from lightning_twa.trainer import progress_bar


@pytest.mark.parametrize("first", [True, False])
def test_rich_progress_bar(tmp_path, first) -> None:
    pytest.importorskip("rich")
    expected, _ = plain(tmp_path)
    bar = RichProgressBar(console_kwargs={"file": io.StringIO()})
    module, _, _ = beside(tmp_path, [bar], first=first, enable_progress_bar=True)
    assert torch.equal(weights(module), expected)


def test_progress_bars_show_one_value(tmp_path) -> None:
    shown: dict[int, set[str]] = {}

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            metrics = self.get_metrics(trainer, trainer.lightning_module)
            shown.setdefault(trainer.current_epoch, set()).update(metrics)

    beside(tmp_path, [Bar()], first=True, enable_progress_bar=True)
    assert shown[0] == set()
    assert [shown[epoch] for epoch in range(1, 6)] == [{"twa/num_candidates"}] * 5


BARS = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}
LONG = (
    "TWA: building the subspace",
    "TWA: measuring held-out losses",
    "TWA: re-estimating BatchNorm statistics",
)


def run(tmp_path: Path, bar: Any, **kwargs: Any) -> lightning_twa.TWACallback:
    """With everything that is said or takes long."""
    torch.manual_seed(0)
    callback = lightning_twa.TWACallback(4)
    bars = [] if bar is None else [bar]
    trainer(
        tmp_path, callbacks=[callback, *bars], enable_progress_bar=bar is not None, **kwargs
    ).fit(Regressor(batchnorm=True), loader(), loader(64, batch_size=8, seed=1))
    return callback


def check_lines(rows: list[str], callback: lightning_twa.TWACallback) -> None:
    """Each stands there once, from the beginning of a row on, whole, and no bar is above one."""
    table = str(callback.result).splitlines()
    firsts = ["TWA: from epoch 4 only", "TWA: it starts from", "TWA: phase finished after 8"]
    lasts = ["radius 1.", "the standard error.", "4 training batches."]
    firsts += [f"TWA: {table[0]}", *table[1:-1], table[-1][:80]]
    lasts += [f"TWA: {table[0]}", *table[1:-1], table[-1][-10:].strip()]
    places = []
    for first, last in zip(firsts, lasts, strict=True):
        begins = [i for i, row in enumerate(rows) if row.startswith(first)]
        assert len(begins) == 1, (first, rows)
        text = ""
        for row in rows[begins[0] : begins[0] + 4]:  # a terminal breaks what is long
            text += row
            if text.rstrip().endswith(last):
                break
        assert text.rstrip().endswith(last), (text, rows)
        places.append(begins[0])
    assert places == sorted(places)
    bars = [i for i, row in enumerate(rows) if "Epoch " in row and "4/4" in row]
    assert all(i > places[-1] for i in bars)


@pytest.mark.parametrize("kind", [*BARS, None])
def test_lines_stand_once_whole_and_above_the_bars(tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    with terminal(monkeypatch) as screen:
        callback = run(tmp_path, None if kind is None else BARS[kind]())
    check_lines(screen.rows, callback)
    assert any("5/5" in row or "Epoch 5" in row for row in screen.rows) == (kind is not None)
    assert not any(what in row for row in screen.rows for what in LONG)  # they are over
    assert all((what in screen.text) == (kind is not None) for what in LONG)


def test_lines_of_the_rich_bar_keep_their_numbers(tmp_path, monkeypatch) -> None:
    """By which Lightning looks them up: in 2.5 at each batch, later in its properties."""
    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    bar, seen, said = RichProgressBar(console_kwargs={"file": io.StringIO()}), [], []
    ours: list[list[int]] = []
    line_of = progress_bar._line_of

    def told(bars: Any, what: str, total: float) -> Any:
        said.append(what)
        return line_of(bars, what, total)

    class Numbers(L.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            seen.append([task.id for task in bar.progress.tasks])
            ours.append([t.id for t in bar.progress.tasks if t.fields.get(progress_bar.OURS)])

    monkeypatch.setattr(progress_bar, "_line_of", told)
    callback = lightning_twa.TWACallback(4)
    trainer(tmp_path, callbacks=[callback, bar, Numbers()], enable_progress_bar=True).fit(
        Regressor(batchnorm=True), loader(), loader(64, batch_size=8, seed=1)
    )
    assert set(said) == set(LONG)
    assert all(ids == list(range(len(ids))) for ids in seen)
    assert max(map(len, ours)) == 1, "one line is used for all"


@pytest.mark.parametrize("kind", BARS)
def test_warnings_stand_above_the_bars(tmp_path, monkeypatch, kind) -> None:
    def show(message: Any, category: Any, filename: str, lineno: int, *args: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    class Warned(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                warn("Something is so, because of this. Do that.")

    with terminal(monkeypatch) as screen, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # pytest collects them
        trainer(tmp_path, callbacks=[Warned(), BARS[kind]()], enable_progress_bar=True).fit(
            Regressor(), loader()
        )
    text = "".join(screen.rows)
    assert text.count("UserWarning: Something is so, because of this. Do that.") == 1
    (row,) = (row for row in screen.rows if "test_progress_bar.py:" in row)
    assert "Epoch" not in row


@pytest.mark.parametrize("kind", [*BARS, None])
def test_lines_in_a_log_file(tmp_path, monkeypatch, kind) -> None:
    """Where both streams are one file, a line of the report begins a line of the file."""
    path = tmp_path / "log"
    handler = logging.StreamHandler(path.open("a", buffering=1))
    rank_zero.log.addHandler(handler)
    try:
        with path.open("a", buffering=1) as out, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", out)
            callback = run(tmp_path, None if kind is None else BARS[kind]())
    finally:
        rank_zero.log.removeHandler(handler)
        handler.stream.close()
    lines = path.read_bytes().decode().split("\n")
    wanted = [f"TWA: {callback.result}".split("\n")[0], f"{callback.result.verdict}"]
    assert [lines.count(line) for line in wanted] == [1, 1]
    assert sum(line.startswith("TWA: from epoch 4") and line[-1] == "." for line in lines) == 1
    assert sum(line.startswith("TWA: phase finished") and line[-1] == "." for line in lines) == 1


def test_lines_go_to_a_file_where_only_errors_do(tmp_path, monkeypatch) -> None:
    errors = (tmp_path / "errors").open("w")
    with errors, terminal(monkeypatch, errors=errors) as screen:
        callback = run(tmp_path, RichProgressBar())
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines.count(callback.result.verdict) == 1
    assert not any("TWA: phase finished" in row for row in screen.rows)


@pytest.mark.parametrize("bar", [None, *(kind(refresh_rate=0) for kind in BARS.values())])
def test_without_a_bar_nothing_has_one(tmp_path, monkeypatch, capsys, bar) -> None:
    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    run(tmp_path, bar)
    captured = capsys.readouterr()
    assert not any(what in captured.out + captured.err for what in LONG)


def test_a_bar_of_the_users_own_making_has_plain_ones_beside(tmp_path, monkeypatch, capsys) -> None:
    class Own(ProgressBar):
        def disable(self) -> None: ...

    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    callback = run(tmp_path, Own())
    shown = capsys.readouterr().out
    assert all(what in shown for what in LONG)
    numel = sum(p.numel() for p in callback.candidates[0].parameters.values())
    assert numel == 81
    assert "/162" in shown  # columns in two passes
    assert "/4.00 " in shown  # batches of training
    measured = len(callback.result.losses) * callback.result.batches
    assert f"/{measured:.1f} " in shown


def test_a_phase_that_goes_on_is_built_in_one_pass(tmp_path, monkeypatch, capsys) -> None:
    """Its directions are known: no Gram matrix is needed."""

    class Boom(L.Callback):
        armed = True

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if self.armed and trainer.current_epoch == 4:
                self.armed = False
                raise KeyError

    monkeypatch.setattr("lightning_twa.trainer.progress_bar.PATIENCE", 0.0)
    module, callbacks = Regressor(batchnorm=True), [twa(), Boom(), TQDMProgressBar()]
    the_trainer = trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True)
    with pytest.raises(KeyError):
        the_trainer.fit(module, loader())
    assert "/162" in capsys.readouterr().out
    the_trainer.fit(module, loader())
    shown = capsys.readouterr().out
    assert "/81.0 " in shown
    assert "/162" not in shown
