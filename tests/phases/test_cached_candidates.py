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


@pytest.mark.parametrize("kind", ["mask", "simplex"])
def test_so_they_are_where_coefficients_are_not_free(tmp_path: Path, kind: Any) -> None:
    """What such a phase ends with may be put together from them."""
    options = cached(tmp_path, subspace=SubspaceConfig(parametrization=kind))
    path = interrupted(tmp_path, **options)
    flip(candidate(tmp_path))
    with pytest.raises(CandidateFileError, match=r"epoch=2\.safetensors is damaged"):
        run(tmp_path, Regressor, lambda: twa(**options), ckpt_path=path)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_hook_that_edits_values_makes_the_file_one_of_other_candidates(
    tmp_path: Path, kind: Any
) -> None:
    class Edits(Regressor):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name, tensor in checkpoint["state_dict"].items():
                checkpoint["state_dict"][name] = 0.5 * tensor

    found = []
    for caches in (True, False):
        folder = tmp_path / str(caches)
        where = str(folder / "c") if caches or kind == "disk" else None
        storage = StorageConfig(kind=kind, dirpath=where, cache_subspace=caches)
        path = interrupted(folder, storage=storage)
        found.append(run(folder, Edits, lambda s=storage: twa(storage=s), ckpt_path=path))
    assert not differences(*found)


def test_a_header_is_believed_only_when_it_has_been_verified(tmp_path: Path) -> None:
    """One letter of a tensor's name is another one, so that a tensor seems to be missing."""
    path = interrupted(tmp_path)
    content = candidate(tmp_path).read_bytes()
    assert b"parameters.net.0.bias" in content
    for damage in (b"parameters.net.0.bixs", b"parameterx.net.0.bias", b"\xffarameters.net.0.bias"):
        candidate(tmp_path).write_bytes(content.replace(b"parameters.net.0.bias", damage))
        with pytest.raises(CandidateFileError, match=r"epoch=2\.safetensors is damaged"):
            run(tmp_path, Regressor, lambda: twa(**cached(tmp_path)), ckpt_path=path)


class Zero(L.Callback):
    """Changes weights before the first batch."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()


class At(L.Callback):
    """Saves a checkpoint within an epoch of the phase, and is interrupted there."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 18:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "at.ckpt")
            raise KeyError("planned")


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("caches", [True, False])
def test_weights_of_others_are_put_right_within_an_epoch_too(
    tmp_path: Path, bits: Any, caches: bool
) -> None:
    storage = StorageConfig(kind="disk", dirpath=str(tmp_path / "c"), cache_subspace=caches)
    options = {"storage": storage, "subspace": SubspaceConfig(bits=bits)}
    L.seed_everything(1, verbose=False)
    the_trainer = trainer(tmp_path, callbacks=[twa(**options), At()])
    with pytest.raises(KeyError, match="planned"):
        the_trainer.fit(Regressor(), ordered(), ordered(32, seed=1))
    states = []
    for others in ([], [Zero()]):
        module = Regressor()
        trainer(tmp_path, callbacks=[twa(**options), *others]).fit(
            module, ordered(), ordered(32, seed=1), ckpt_path=tmp_path / "at.ckpt"
        )
        states.append(module.state_dict())
    assert equal(*states)


def test_a_checkpoint_that_others_keep_has_plain_values(tmp_path: Path) -> None:
    class Keep(L.Callback):
        def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            torch.save(checkpoint, tmp_path / "kept.ckpt")

    storage = StorageConfig(kind="memory", dirpath=str(tmp_path / "c"), cache_subspace=True)
    path = interrupted(tmp_path, storage=storage)
    the_trainer = trainer(tmp_path, callbacks=[twa(storage=storage), Keep()])
    the_trainer.fit(Regressor(), ordered(), ordered(32, seed=1), ckpt_path=path)
    kept, before = (torch.load(p, weights_only=True) for p in (tmp_path / "kept.ckpt", path))
    assert kept["callbacks"].keys() == before["callbacks"].keys()


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
    """Puts a damaged candidate's file back when the phase is over, for the report."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_bytes(self.content)
        trainer.strategy.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("distribute", ["replicate", "shard"])
def test_two_processes_end_alike(tmp_path: Path, distribute: str) -> None:
    """Whichever of them looks at the file that is damaged."""
    options = cached(tmp_path, distribute=distribute)
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    how = {"train": ddp.strided(2), "use_distributed_sampler": False}
    interrupt = {"callbacks": [saver, InPhase()], "enable_checkpointing": True}
    with pytest.raises(Exception, match="planned"):
        ddp.fit(tmp_path / "whole", twa(**options), ddp.Wide(), **interrupt, **how)
    path = tmp_path / "saved" / "epoch=4.ckpt"
    content = candidate(tmp_path, 1).read_bytes()
    restore = Restore(candidate(tmp_path, 1), content)
    flip(candidate(tmp_path, 1))
    kept = {p: p.read_bytes() for p in (tmp_path / "c").glob("subspace_0/**/*.safetensors")}
    assert kept, "the phase has the file of its subspace"
    found = []
    for damaged in (True, False):
        folder = tmp_path / f"resumed{damaged}"
        found.append(
            ddp.fit(folder, twa(**options), ddp.Wide(), callbacks=[restore], ckpt_path=path, **how)
        )
        for p, was in kept.items():
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(was)
    for reports in found:
        assert equal(reports[0]["state"], reports[1]["state"])
        assert {report["phase"] for report in reports} == {"done"}
    assert equal(found[0][0]["state"], found[1][0]["state"]), "nothing has needed it"
    header = content.replace(b"parameters.net.0.bias", b"parameters.net.0.bixs")
    candidate(tmp_path, 1).write_bytes(header)
    with pytest.raises(Exception, match=r"epoch=1\.safetensors is damaged"):
        ddp.fit(tmp_path / "header", twa(**options), ddp.Wide(), ckpt_path=path, **how)


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
