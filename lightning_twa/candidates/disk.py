"""Files of a run's candidates, which the processes of a host share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lightning_twa.candidates.background import Writing
from lightning_twa.candidates.candidate import Candidate
from lightning_twa.candidates.files import (
    CandidateFileError,
    Reference,
    delete_candidate,
    make_directory,
    read_candidate,
    verify_candidate,
    write_candidate,
)
from lightning_twa.machine import (
    gather_objects,
    in_order,
    rank,
    threads_here,
    warn,
    world_size,
)

__all__ = ["Disk"]

Files = list[Reference]


class Disk:
    """A directory of one run's candidates, mapped into the memory of every process.

    One process writes for all that see its files; each host that does not see them has a writer of
    its own. Where parameters are sharded, every process writes its shards. Every process calls
    every method.

    Args:
        root: Directory of the directories of runs, the same path on every host.
        shards: Whether each process has a part of every parameter.
        kind: What the names of directories begin with.
        in_pieces: Whether several processes and cores verify one file.
    """

    def __init__(
        self, root: Path, *, shards: bool = False, kind: str = "version", in_pieces: bool = False
    ) -> None:
        self.root = root
        self.shards = shards
        self.kind = kind
        self.in_pieces = in_pieces
        self._own = rank() if shards else 0  # also when the processes' group is gone
        self.directory: Path | None = None
        self._part = root  # where this process writes
        self._parts = 0  # begun after the first one
        self._writes = False

    def write(self, make: Callable[[], Candidate]) -> tuple[Candidate, Files]:
        """Write a candidate and map it.

        Args:
            make: Gives the candidate; called where it is written.

        Returns:
            The mapped candidate, and its file or, with shards, the files of all processes.

        Raises:
            OSError: On every process, when one of them could not make or write it, whatever it
                raised, or not read what was written.
        """
        if self.directory is None:
            self._open()
        written: Reference | None = None
        problem = None
        if self._writes:
            try:
                written = _write(self.root, self._part, make(), self.in_pieces)
            except Exception as error:  # of any kind: the other processes wait for an answer
                problem = _said(error)
        return self._map(written, problem)

    def begin(self, candidate: Candidate) -> Writing:
        """Begin to write a candidate in a thread.

        Args:
            candidate: In memory; does not change.

        Returns:
            What :meth:`finish` is to get.

        Raises:
            OSError: On every process, when there is no directory.
        """
        if self.directory is None:
            self._open()
        write = partial(_write, self.root, self._part, candidate, self.in_pieces)
        return Writing(write if self._writes else None)

    def finish(self, writing: Writing) -> tuple[Candidate, Files]:
        """Wait for a candidate's files, and map it. Returns and raises what :meth:`write` does."""
        written, error = writing.wait()
        return self._map(written, None if error is None else _said(error))

    def _map(self, written: Reference | None, problem: str | None) -> tuple[Candidate, Files]:
        answers = gather_objects((written, problem))
        files = [reference for reference, _ in answers if reference is not None]
        files = files if self.shards else files[:1]
        try:
            _raise_on_all([problem for _, problem in answers], OSError)
            return self.read(files, verify=False), files
        except (OSError, CandidateFileError) as error:
            if written is not None:
                delete_candidate(self.root, written)
            raise OSError(str(error)) from error

    def begin_part(self) -> None:
        """Write further candidates to a folder of their own: their names may come again."""
        if self.directory is not None:
            self._parts += 1
            self._part = self._part_of(self.directory)

    def _part_of(self, directory: Path) -> Path:
        part = directory / f"part_{self._parts}" if self._parts else directory
        return part / f"rank_{rank()}_of_{world_size()}" if self.shards else part

    def read(self, files: Files, *, verify: bool = True) -> Candidate:
        """Map a candidate.

        Args:
            files: From :meth:`write`.
            verify: Read the file and compare its digest.

        Raises:
            CandidateFileError: On every process, naming the file that one of them could not read.
        """
        (found,) = self.read_all([files], verify=verify)
        if isinstance(found, CandidateFileError):
            raise found
        return found

    def read_all(
        self, many: Sequence[Files], *, verify: bool = True
    ) -> list[Candidate | CandidateFileError]:
        """Map candidates, of which some may be damaged; the same ones on every process.

        Args:
            many: Of each candidate what :meth:`write` has returned.
            verify: Read the files and compare their digests: over the cores, and of files that
                processes of a host share each in one of them.

        Returns:
            Candidates or, on every process, the error that names the file which one of them could
            not read.
        """
        own = rank() if self.shards else 0
        processes = world_size() if self.shards else 1
        fitting = [i for i, files in enumerate(many) if len(files) == processes]
        problems = self._damages({i: many[i][own] for i in fitting}) if verify else {}
        candidates: dict[int, Candidate] = {}
        for i in fitting:
            try:
                candidates[i] = read_candidate(self.root, many[i][own], verify=False)
            except Exception as error:  # as in write()
                damage = None if i in problems or verify else self._damage(many[i][own], 0)
                problems.setdefault(i, damage or _said(error))
        everywhere = gather_objects(problems)
        found: list[Candidate | CandidateFileError] = []
        for i, files in enumerate(many):
            problem = next((said[i] for said in everywhere if i in said), None)
            if len(files) != processes:
                problem = (
                    f"Candidate {files[0].name!r} was written by {len(files)} process(es) with a "
                    f"part of the parameters each, but now there are {world_size()} with "
                    f"{'a part' if self.shards else 'all'} of them. Resume as it was."
                )
            found.append(candidates[i] if problem is None else CandidateFileError(problem))
        return found

    def read_here(self, files: Files) -> Candidate:
        """Map a candidate in this process alone, after comparing its digest.

        Raises:
            CandidateFileError: Naming the file that could not be read.
        """
        return read_candidate(self.root, files[self._own])

    def _damages(self, references: Mapping[int, Reference]) -> dict[int, str]:
        """What is wrong with files, of those, or those pieces, that fall to this process."""
        here = (_host(), rank() if self.shards else 0)
        peers = [i for i, host in enumerate(gather_objects(here)) if host == here]
        every = [(i, piece) for i, r in references.items() for piece in range(len(r.pieces) or 1)]
        jobs = every[peers.index(rank()) :: len(peers)]

        def verify(job: tuple[int, int], room: None) -> str | None:
            return self._damage(references[job[0]], job[1])

        found = in_order(verify, jobs, lambda: None, min(threads_here(), len(jobs)))
        return {i: said for (i, _), said in zip(jobs, found, strict=True) if said is not None}

    def _damage(self, reference: Reference, piece: int) -> str | None:
        try:
            verify_candidate(self.root, reference, piece)
        except Exception as error:  # as in write()
            return _said(error)
        return None

    def delete(self, files: Files) -> None:
        """Delete a candidate's file where this process has written it; never another run's. One
        that cannot be deleted is a warning.
        """
        mine = files[rank()] if self.shards else files[0]
        if self._writes and mine.file.startswith(f"{self.directory.name}/"):  # type: ignore[union-attr]
            try:
                delete_candidate(self.root, mine)
            except OSError as error:
                warn(
                    f"The file {mine.file} in {self.root} is not needed any more, but could not be "
                    f"deleted ({error}). Delete it when the run is over."
                )

    def _open(self) -> None:
        """Agree on a new directory, and on who writes."""
        made, problem = None, None
        if rank() == 0:
            try:
                made = make_directory(self.root, self.kind).name
            except Exception as error:  # as in write()
                problem = _said(error)
        made, problem = gather_objects((made, problem))[0]
        _raise_on_all([problem], OSError)
        directory = self.root / str(made)
        host = (_host(), os.path.isdir(directory))
        hosts = gather_objects(host)
        first = hosts.index(host) == rank() and not host[1]
        self._writes = self.shards or rank() == 0 or first
        self._part = self._part_of(directory)
        if self._writes:
            try:
                self._part.mkdir(parents=True, exist_ok=True)
            except Exception as error:  # as in write()
                problem = _said(error)
        _raise_on_all(gather_objects(problem), OSError)
        self.directory = directory


def _write(root: Path, directory: Path, candidate: Candidate, in_pieces: bool) -> Reference:
    directory.mkdir(parents=True, exist_ok=True)
    return write_candidate(root, directory, candidate, in_pieces=in_pieces)


def _host() -> str:
    """What tells this machine from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _said(error: Exception) -> str:
    """What an error says, with its type where the message needs it."""
    kinds = OSError | ValueError | TypeError | CandidateFileError
    known = isinstance(error, kinds) and str(error)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _raise_on_all(problems: list[str | None], kind: type[Exception]) -> None:
    """Raise when any process has a problem; every process has all of them."""
    for problem in problems:
        if problem is not None:
            raise kind(problem)
