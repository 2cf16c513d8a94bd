"""A phase that is resumed with the file of its subspace verifies candidates before it uses them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations

from helpers import ddp
from helpers.common import Regressor, trainer
from helpers.fallback import break_step
from helpers.resume import differences, equal, ordered, run, saved, twa
from lightning_twa import StorageConfig, SubspaceConfig, average
from lightning_twa.candidates import CandidateFileError, files, reference
from lightning_twa.phases import span

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]

MASK = SubspaceConfig(parametrization="mask")  # puts candidates together


class InPhase(L.Callback):
    """Interrupts a run in the phase, in its fifth epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 5:
            raise KeyError("planned")


def cached(folder: Path, **kwargs: Any) -> dict[str, Any]:
    storage = StorageConfig(kind="disk", dirpath=str(folder / "c"), cache_subspace=True)
    return {"storage": storage, **kwargs}


def interrupted(folder: Path, module: type[Regressor] = Regressor, **kwargs: Any) -> Path:
    """A checkpoint of the phase; the files of its subspace and of its candidates are there."""
    saver = ModelCheckpoint(folder / "saved", save_top_k=-1, save_on_train_epoch_end=True)
    L.seed_everything(1, verbose=False)
    callbacks = [twa(**cached(folder, **kwargs)), saver, InPhase()]
    the_trainer = trainer(folder, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(module(), ordered(), ordered(32, seed=1))
    return saved(folder / "saved")[4]


def candidate(folder: Path, epoch: int = 2) -> Path:
    return folder / "c" / "version_0" / f"epoch={epoch}.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 64
    path.write_bytes(content)


def see_verifying(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are verified from here on."""
    verified: list[str] = []
    check = files._check_bytes

    def look(path: Path, of: Any, piece: int) -> None:
        verified.append(of.name)
        check(path, of, piece)

    monkeypatch.setattr(files, "_check_bytes", look)
    return verified


def test_candidates_that_nothing_needs_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of them that is damaged changes nothing; who asks for it is told."""
    whole = run(tmp_path, Regressor, twa)
    path = interrupted(tmp_path)
    flip(candidate(tmp_path))
    verified = see_verifying(monkeypatch)
    callback = twa(**cached(tmp_path))
    resumed = run(tmp_path, Regressor, lambda: callback, ckpt_path=path)
    assert not differences(whole, resumed)
    assert not any(name.startswith("epoch") for name in verified)
    for use in (lambda: callback.candidates, lambda: average(callback)):
        with pytest.raises(CandidateFileError, match=r"epoch=2\.safetensors is damaged"):
            use()


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_what_a_look_shows_is_an_error_at_once(tmp_path: Path, how: str) -> None:
    path = interrupted(tmp_path)
    content = candidate(tmp_path).read_bytes()
    candidate(tmp_path).unlink()
    if how == "truncated":
        candidate(tmp_path).write_bytes(content[:-1])
    with pytest.raises(CandidateFileError, match=rf"epoch=2\.safetensors .*{how}"):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path)), ckpt_path=path)


def test_they_are_verified_before_a_subspace_is_built_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(tmp_path)
    flip(candidate(tmp_path))
    (subspace,) = (tmp_path / "c").glob("subspace_0/*")
    flip(subspace)
    monkeypatch.setattr(span, "build_subspace", lambda *args, **kwargs: pytest.fail("was built"))
    with pytest.raises(CandidateFileError, match=r"epoch=2\.safetensors is damaged"):
        run(tmp_path, Regressor, lambda: twa(**cached(tmp_path)), ckpt_path=path)


def test_with_groups_they_are_verified_where_the_phase_goes_on(tmp_path: Path) -> None:
    """The next group needs them, and at the end they are the result."""
    options = cached(tmp_path, subspace=SubspaceConfig(group_size=2))
    path = interrupted(tmp_path, **options)
    flip(candidate(tmp_path))
    with pytest.raises(CandidateFileError, match=r"epoch=2\.safetensors is damaged"):
        run(tmp_path, Regressor, lambda: twa(**options), ckpt_path=path)


def test_one_that_is_damaged_at_the_end_is_a_warning(tmp_path: Path) -> None:
    """The model has what its coefficients say."""
    whole = run(tmp_path, Regressor, lambda: twa(subspace=MASK))
    path = interrupted(tmp_path, subspace=MASK)
    flip(candidate(tmp_path))
    match = r"could not be put together from the candidates .*epoch=2\.safetensors is damaged"
    with pytest.warns(UserWarning, match=match):
        resumed = run(
            tmp_path, Regressor, lambda: twa(**cached(tmp_path, subspace=MASK)), ckpt_path=path
        )
    assert resumed.callback["phase"] == "done"
    for name, tensor in whole.state.items():
        torch.testing.assert_close(resumed.state[name], tensor, rtol=1e-4, atol=1e-5)


def test_where_all_are_good_the_end_is_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path, Regressor, lambda: twa(subspace=MASK))
    path = interrupted(tmp_path, subspace=MASK)
    options = cached(tmp_path, subspace=MASK)
    resumed = run(tmp_path, Regressor, lambda: twa(**options), ckpt_path=path)
    assert not differences(whole, resumed)


def test_a_phase_that_fails_leaves_the_damaged_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the average that it ends with."""
    path = interrupted(tmp_path)
    flip(candidate(tmp_path))
    break_step(monkeypatch, 3)
    callback = twa(**cached(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = run(tmp_path, Regressor, lambda: callback, ckpt_path=path)
    said = [str(warning.message) for warning in caught]
    assert any("A candidate is left out" in text and "epoch=2" in text for text in said)
    assert any("uniform average of its 2 candidates" in text for text in said)
    assert callback.candidate_names == ["epoch=1", "epoch=3"]
    first, last = (c.parameters for c in callback.candidates)
    for name, tensor in first.items():
        mean = ((tensor.double() + last[name].double()) / 2).float()
        torch.testing.assert_close(ended.state[name], mean)


class Spectral(Regressor):
    """With a spectral norm of a square weight, whose dimension the newest candidate shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, parametrizations.spectral_norm(nn.Linear(6, 6)))


@pytest.mark.parametrize("damaged", [False, True])
def test_singular_vectors_are_fitted_by_a_verified_candidate(tmp_path: Path, damaged: bool) -> None:
    whole = run(tmp_path, Spectral, twa)
    path = interrupted(tmp_path, Spectral)
    if damaged:
        flip(candidate(tmp_path, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run(tmp_path, Spectral, lambda: twa(**cached(tmp_path)), ckpt_path=path)
    said = [str(w.message) for w in caught if "Spectral norms are" in str(w.message)]
    assert bool(said) == damaged
    assert not differences(whole, resumed)


class Restore(L.Callback):
    """Puts a damaged candidate's file back when the phase is over."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_bytes(self.content)
        trainer.strategy.barrier()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The average that was learned could not be put together")
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_two_processes_end_alike(tmp_path: Path, distribute: str) -> None:
    """Whichever of them looks at the file that is damaged."""
    options = cached(tmp_path, subspace=MASK, distribute=distribute)
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    how = {"train": ddp.strided(2), "use_distributed_sampler": False}
    interrupt = {"callbacks": [saver, InPhase()], "enable_checkpointing": True}
    with pytest.raises(Exception, match="planned"):
        ddp.fit(tmp_path / "whole", twa(**options), ddp.Wide(), **interrupt, **how)
    damaged = candidate(tmp_path, 1)
    restore = Restore(damaged, damaged.read_bytes())
    ends = []
    for flips in (False, True):
        if flips:
            flip(damaged)
        folder = tmp_path / f"resumed{flips}"
        path = tmp_path / "saved" / "epoch=4.ckpt"
        kept = {p: p.read_bytes() for p in (tmp_path / "c").glob("subspace_0/**/*.safetensors")}
        assert kept, "the phase has the file of its subspace"
        found = ddp.fit(
            folder, twa(**options), ddp.Wide(), callbacks=[restore], ckpt_path=path, **how
        )
        for p, content in kept.items():
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(content)
        assert equal(found[0]["state"], found[1]["state"])
        assert {report["phase"] for report in found} == {"done"}
        ends.append(found[0])
    assert equal(ends[0]["averaging_weights"], ends[1]["averaging_weights"])
    assert not equal(ends[0]["state"], ends[1]["state"]), "with the rounding of the basis"
    for name, tensor in ends[0]["state"].items():
        torch.testing.assert_close(ends[1]["state"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.99])
def test_every_piece_of_the_file_of_the_subspace_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, at: float
) -> None:
    for module in (files, reference):
        monkeypatch.setattr(module, "PIECE", 200)
    whole = run(tmp_path, Regressor, twa)
    path = interrupted(tmp_path)
    states = torch.load(path, weights_only=True)["callbacks"].values()
    (state,) = [found for found in states if "mixing" in found]
    assert len(state["subspace"][0]["pieces"]) > 4
    (subspace,) = (tmp_path / "c").glob("subspace_0/*")
    content = bytearray(subspace.read_bytes())
    content[int(at * len(content))] ^= 1
    subspace.write_bytes(content)
    with caplog.at_level(logging.INFO):
        resumed = run(tmp_path, Regressor, lambda: twa(**cached(tmp_path)), ckpt_path=path)
    assert any("built again" in r.message and "SHA-256" in r.message for r in caplog.records)
    assert not differences(whole, resumed)


def test_the_mapped_file_is_not_written_to(tmp_path: Path) -> None:
    """And the phase goes on where somebody deletes it meanwhile."""

    class Delete(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            for path in (tmp_path / "c").glob("subspace_0/*"):
                content.append(path.read_bytes())
                if trainer.global_step > 21:
                    path.unlink()

    whole = run(tmp_path, Regressor, twa)
    path = interrupted(tmp_path)
    (subspace,) = (tmp_path / "c").glob("subspace_0/*")
    content = [subspace.read_bytes()]
    L.seed_everything(99, verbose=False)
    module, callback = Regressor(), twa(**cached(tmp_path))
    the_trainer = trainer(tmp_path, callbacks=[callback, Delete()])
    the_trainer.fit(module, ordered(), ordered(32, seed=1), ckpt_path=path)
    assert len(content) > 2
    assert set(content) == {content[0]}
    assert equal(module.state_dict(), whole.state)
