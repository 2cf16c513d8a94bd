"""Averages with weights that are not learned: the baselines of TWA, on files or candidates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_twa.candidates import (
    Candidate,
    decay_curve,
    find_files,
    fit_singular_vectors_,
    fitted_factors,
    is_dense,
    read_file,
    total_weight,
    unique_names,
)
from lightning_twa.config import check_choice, is_int, is_real
from lightning_twa.results import RunResults
from lightning_twa.subspace import check_finite, in_float64

__all__ = ["METHODS", "average"]

METHODS = ("uniform", "ema", "power", "wsm", "greedy", "model_stock", "weights")
NEEDS = {"ema": "decay", "power": "sigma_rel", "weights": "weights", "model_stock": "anchor"}
State = dict[str, Tensor]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def average(
    candidates: RunResults | Paths | Sequence[Mapping[str, Tensor]],
    method: Literal[
        "uniform", "ema", "power", "wsm", "greedy", "model_stock", "weights"
    ] = "uniform",
    *,
    last: int | None = None,
    decay: float | None = None,
    weights: Sequence[float] | Tensor | None = None,
    score: Callable[[State], float] | None = None,
    module: LightningModule | None = None,
    trainer: Trainer | None = None,
    dataloaders: Any = None,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    anchor: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    sigma_rel: float | None = None,
) -> State:
    """Average candidates with weights that are not learned.

    Sums are in float64. Integer tensors, such as BatchNorm's counters, are those of the newest
    candidate. Singular vectors of spectral normalisation are computed for the average. BatchNorm
    statistics are averaged like weights, and do not fit the average: compute them anew
    (``torch.optim.swa_utils.update_bn``) before you use it.

    Args:
        candidates: A callback after its run; or files, as ``CollectConfig.checkpoints`` names them;
            or state dicts. Oldest first.
        method: ``"uniform"``; ``"ema"``, an exponential moving average over the candidates (not
            over steps); ``"power"``, the average over all steps in which step ``s`` has a weight
            proportional to ``s ** gamma``, of any width: its weights over the steps are fitted, by
            least squares, by those of the power averages among the candidates (Karras et al., arXiv
            2312.02696, section 3.2), and a message says how well; ``"wsm"``, the merge of equally
            spaced checkpoints of one run that stands for a learning rate which falls as
            ``1 - sqrt(u)`` from the first of them to the last (arXiv 2507.17634); ``"greedy"``, the
            greedy soup (Wortsman et al., arXiv 2203.05482, algorithm 1), which takes the candidates
            from the best on and keeps each that makes the average no worse; ``"model_stock"``, of
            fine-tuned models and the one that they start from, tensor by tensor as the angles
            between them say (Jang et al., arXiv 2403.19522); ``"weights"``, given ones.
        last: Use the newest so many only.
        decay: Of ``"ema"``, in (0, 1).
        weights: Of ``"weights"``: one number for each candidate, used as they are; a warning says
            where they do not sum to 1.
        score: Of ``"greedy"``: how good a state dict is; higher is better.
        module: Of ``"greedy"``, instead of ``score``: the model to validate; its weights are as
            before afterwards.
        trainer: Validates it.
        dataloaders: For ``trainer.validate``; ``None`` means the module's own.
        monitor: The metric of ``trainer.validate`` to go by.
        mode: Whether it is to be small or large.
        sigma_rel: Of ``"power"``: the width, as in ``CollectConfig.power_averages``.
        anchor: Of ``"model_stock"``: the pre-trained model, a file or a state dict.

    Returns:
        A state dict, in the dtypes and with the names of the candidates.

    Raises:
        ValueError: Naming the argument that is missing or has no meaning, or the candidate and the
            tensor that differ from the others.
    """
    check_choice("method", method, METHODS)
    given = {"decay": decay, "weights": weights, "anchor": anchor, "sigma_rel": sigma_rel}
    needs = NEEDS.get(method)
    for name, value in given.items():
        if (value is None) == (name == needs):
            raise ValueError(
                f"average(method={method!r}) "
                + (f"needs {name}." if value is None else f"does not use {name}={value!r}.")
            )
    members = _members(candidates)
    if last is not None:
        if not (is_int(last) and last >= 1):
            raise ValueError(f"Invalid {last=}. Must be an int >= 1, or None (all candidates).")
        members = members[-last:]
    if method == "greedy":
        if score is None:
            score = _validation(module, trainer, dataloaders, monitor, mode)
        elif module is not None or trainer is not None:
            raise ValueError("average(method='greedy') takes a score, or a module and a trainer.")
        return _greedy(members, score)
    if score is not None or module is not None or trainer is not None:
        raise ValueError(f"average(method={method!r}) does not use score, module and trainer.")
    if anchor is not None:
        return _model_stock(members, anchor)
    if sigma_rel is not None:
        names = [member.name.partition("'")[2].rstrip("'") for member in members]
        return _mix(members, fitted_factors(names, sigma_rel))
    if method == "wsm":
        return _mix(members, decay_curve(len(members)))
    return _mix(members, _factors(len(members), decay, weights))


def _factors(
    n: int, decay: float | None, weights: Sequence[float] | Tensor | None
) -> Sequence[float]:
    if decay is not None:
        if not (is_real(decay) and 0 < decay < 1):
            raise ValueError(f"Invalid {decay=}. Must be in (0, 1).")
        powers = [decay ** (n - 1 - i) for i in range(n)]
        return [power / sum(powers) for power in powers]
    if weights is None:
        return [1 / n] * n
    factors = [float(weight) for weight in weights]
    if len(factors) != n or not all(is_real(factor) for factor in factors):
        raise ValueError(
            f"Invalid weights={factors}. There are {n} candidates: pass so many finite numbers."
        )
    if abs(sum(factors) - 1) > 1e-2:
        rank_zero_warn(
            f"The weights sum to {sum(factors):g}, not to 1, so the result is no average but that "
            f"many times one. Divide them by their sum if an average is meant."
        )
    return factors


# --- candidates


class _Member:
    """A candidate that is read when it is needed."""

    def __init__(self, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        self.name = name
        self._read = read

    def tensors(self) -> State:
        """Its tensors, all finite."""
        state = {k: t for k, t in self._read().items() if isinstance(t, Tensor)}
        for key, tensor in state.items():
            if tensor.is_floating_point() and is_dense(tensor):
                wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no sum
                check_finite(wide, f"{self.name}, tensor {key!r},")
        return state


def _members(candidates: Any) -> list[_Member]:
    if isinstance(candidates, RunResults):
        further = candidates.further_names
        members = [
            _Member(
                f"Candidate {candidate.name!r}",
                lambda c=candidate: _state_dict(c, further),  # type: ignore[misc]
            )
            for candidate in candidates.candidates
        ]
        if not members:
            raise ValueError(
                "The callback has no candidates: it has not run, or it was restored or copied "
                "after its end, when checkpoints and copies do not hold them any more. Average "
                "files instead."
            )
        return members
    several = isinstance(candidates, Sequence) and not isinstance(candidates, str)
    if several and candidates and all(isinstance(c, Mapping) for c in candidates):
        return [
            _Member(f"Candidate {i}", lambda c=c: c)  # type: ignore[misc]
            for i, c in enumerate(candidates)
        ]
    paths = find_files(candidates)
    return [
        _Member(name, lambda p=path: read_file(p))  # type: ignore[misc]
        for path, name in zip(paths, unique_names(paths), strict=True)
    ]


def _state_dict(candidate: Candidate, further: Mapping[str, str]) -> State:
    state = candidate.tensors
    return {**state, **{name: state[own] for name, own in further.items() if own in state}}


# --- averages


class _Sum:
    """A weighted sum of candidates that have the same tensors. What is the same in all of them
    stays as it is where the factors sum to 1, whatever their rounding.
    """

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.first: State = {}
        self.total: dict[str, Tensor] = {}  # of differences from the first
        self.newest: State = {}
        self._name = ""

    def add(self, member: _Member, factor: float) -> None:
        """Add a candidate.

        Raises:
            ValueError: When its names, shapes or dtypes are others than the first one's.
        """
        state = member.tensors()
        if not self.factors:
            self._name, self.first = member.name, state
        else:
            _check_alike(member.name, state, self._name, self.newest)
            for key, tensor in state.items():
                if _is_averaged(tensor):
                    part = factor * (_wide(tensor) - _wide(self.first[key]))
                    self.total[key] = self.total[key] + part if key in self.total else part
        self.factors.append(factor)
        self.newest = state

    def result(self) -> State:
        """The sum, in the candidates' dtypes; of what has none the newest."""
        share = total_weight(self.factors)
        result = {
            key: (share * _wide(self.first[key]) + self.total.get(key, 0.0))
            .to(tensor.dtype)
            .to(tensor.device)
            if _is_averaged(tensor)
            else tensor.detach().clone()
            for key, tensor in self.newest.items()
        }
        fit_singular_vectors_(
            result, self.newest, [key for key, part in self.total.items() if part.any()]
        )
        return result


def _is_averaged(tensor: Tensor) -> bool:
    return is_dense(tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _wide(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    return whole.to(torch.complex128) if tensor.is_complex() else in_float64(whole)


def _check_alike(name: str, state: State, first: str, other: State) -> None:
    for key in [*state, *other]:
        if key not in state or key not in other:
            has, lacks = (name, first) if key in state else (first, name)
            raise ValueError(f"{has} has tensor {key!r}, but {lacks} has not. Average one model's.")
        a, b = state[key], other[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"{name}: tensor {key!r} is {tuple(a.shape)}, {a.dtype}, but in {first} it is "
                f"{tuple(b.shape)}, {b.dtype}. Average one model's."
            )


def _mix(members: Sequence[_Member], factors: Sequence[float]) -> State:
    total = _Sum()
    for member, factor in zip(members, factors, strict=True):
        total.add(member, factor)
    return total.result()


def _model_stock(members: Sequence[_Member], anchor: Any) -> State:
    """Each tensor goes from the anchor to the mean of the members as far as
    ``t = n cos / (1 + (n - 1) cos)``, with the mean cosine of the angles between members as seen
    from the anchor.
    """
    if len(members) < 2:
        raise ValueError(
            f"average(method='model_stock') measures angles between models: it needs two or more, "
            f"but there is {len(members)}."
        )
    found = _members([anchor] if isinstance(anchor, Mapping) else anchor)
    if len(found) != 1:
        raise ValueError(f"anchor={anchor!r} names {len(found)} files. Name the pre-trained model.")
    start = found[0]
    origin, states = start.tensors(), [member.tensors() for member in members]
    for member, state in zip(members, states, strict=True):
        _check_alike(member.name, state, f"The anchor ({start.name})", origin)
    result = dict(_mix(members, [1 / len(members)] * len(members)))
    for key, tensor in origin.items():
        if not _is_averaged(tensor) or not tensor.numel():
            continue
        base = _wide(tensor)
        ways = torch.stack([(_wide(state[key]) - base).reshape(-1) for state in states])
        lengths = ways.norm(dim=1, keepdim=True)
        units = ways / lengths.masked_fill(lengths == 0, 1.0)
        n = len(states)
        cosine = float((units.sum(dim=0).norm() ** 2 - units.norm() ** 2).real / (n * (n - 1)))
        share = max(n * cosine / (1 + (n - 1) * cosine), 0.0) if cosine > -1 / (n - 1) else 0.0
        moved = base + share * ways.mean(dim=0).view(base.shape)
        result[key] = moved.to(tensor.dtype).to(tensor.device)
    return result


def _greedy(members: Sequence[_Member], score: Callable[[State], float]) -> State:
    """Algorithm 1 of arXiv 2203.05482."""
    scores = [_checked(score(_mix([member], [1.0])), member.name) for member in members]
    order = sorted(range(len(members)), key=lambda i: (-scores[i], i))
    kept: list[int] = []
    best = -float("inf")
    for i in order:
        found, size = scores[i], len(kept) + 1
        if kept:
            trial = _mix([members[j] for j in [*kept, i]], [1 / size] * size)
            found = _checked(score(trial), f"the average with {members[i].name}")
        if found >= best:
            kept, best = [*kept, i], found
    names = ", ".join(members[i].name for i in kept)
    rank_zero_info(f"TWA: the greedy soup has {len(kept)} of {len(members)} candidates: {names}.")
    return _mix([members[i] for i in sorted(kept)], [1 / len(kept)] * len(kept))


def _checked(value: Any, of: str) -> float:
    number = float(value)
    if number != number:
        raise ValueError(f"The score of {of} is not a number. Return a number; higher is better.")
    return number


def _validation(
    module: LightningModule | None,
    trainer: Trainer | None,
    dataloaders: Any,
    monitor: str | None,
    mode: str,
) -> Callable[[State], float]:
    """A score that is a metric of ``trainer.validate``."""
    check_choice("mode", mode, ("min", "max"))
    if module is None or trainer is None or monitor is None:
        raise ValueError(
            "average(method='greedy') needs a score(state_dict) function, or module=, trainer= and "
            "monitor=, the name of a metric of trainer.validate."
        )
    own, the_trainer, name = module, trainer, monitor

    def score(state: State) -> float:
        before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
        try:
            # Not all keys: a callback's candidates have floating-point parameters only.
            unknown = own.load_state_dict(state, strict=False).unexpected_keys
            if unknown:
                raise ValueError(f"The module has no tensor {unknown[0]!r}, but candidates have.")
            (metrics, *_) = the_trainer.validate(own, dataloaders, verbose=False)
        finally:
            own.load_state_dict(before)
        if name not in metrics:
            raise ValueError(
                f"monitor={name!r} is no metric of trainer.validate, which gave {sorted(metrics)}."
            )
        return metrics[name] if mode == "max" else -metrics[name]

    return score
