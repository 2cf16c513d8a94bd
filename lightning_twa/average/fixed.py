"""An average of candidates with weights that are not learned."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_twa.average.greedy import greedy, validation
from lightning_twa.average.lora import average_products
from lightning_twa.average.members import Member, Paths, Selected, State, members_of
from lightning_twa.average.sums import mix, model_stock
from lightning_twa.candidates import decay_curve, fitted_factors
from lightning_twa.config import as_names, check_choice, is_int, is_real
from lightning_twa.machine import warn
from lightning_twa.results import RunResults

__all__ = ["METHODS", "average", "factors"]

METHODS = ("uniform", "ema", "power", "wsm", "greedy", "model_stock", "weights")
NEEDS = {"ema": "decay", "power": "sigma_rel", "weights": "weights", "model_stock": "anchor"}


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
    mode: Literal["min", "max"] | None = None,
    anchor: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    sigma_rel: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    lora: Literal["factors", "products"] = "factors",
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
        mode: Whether it is to be small (``"min"``) or large; ``None``: as its name says
            (``"val_loss"``, ``"val_acc"``), and an error where it does not.
        sigma_rel: Of ``"power"``: the width, as in ``CollectConfig.power_averages``.
        anchor: Of ``"model_stock"``: the pre-trained model, a file or a state dict.
        include: Patterns of names, one or a list (``"encoder"``, ``"*.bias"``): only tensors that
            match are averaged, the others are the newest candidate's, and may have another shape
            in each. ``None``: all, of a callback those of its ``CollectConfig``.
        exclude: Patterns of those that are not averaged, also where ``include`` matches.
        lora: What of low-rank adapters is averaged: their two ``"factors"``, as other tensors, or
            their ``"products"``, what they add to the model, which is brought back to the rank of
            the adapters. It matters between adapters that were trained apart, little between steps
            of one run; a message says how much. Not of ``"greedy"`` and ``"model_stock"``.

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
    check_choice("lora", lora, ("factors", "products"))
    if lora == "products" and method in ("greedy", "model_stock"):
        raise ValueError(f"average(method={method!r}) does not use lora='products'.")
    members = members_of(candidates)
    if last is not None:
        if not (is_int(last) and last >= 1):
            raise ValueError(f"Invalid {last=}. Must be an int >= 1, or None (all candidates).")
        members = members[-last:]
    selected = _selection(candidates, members, include, exclude)
    if selected is not None:
        members = [selected.of(member) for member in members]
    if method == "greedy":
        if score is None:
            score = validation(module, trainer, dataloaders, monitor, mode)
        elif module is not None or trainer is not None:
            raise ValueError("average(method='greedy') takes a score, or a module and a trainer.")
        state = greedy(members, score)
    elif score is not None or module is not None or trainer is not None:
        raise ValueError(f"average(method={method!r}) does not use score, module and trainer.")
    elif anchor is not None:
        anchors = members_of([anchor] if isinstance(anchor, Mapping) else anchor)
        if len(anchors) != 1:
            raise ValueError(
                f"anchor={anchor!r} names {len(anchors)} files. Name the pre-trained model."
            )
        state = model_stock(members, anchors[0] if selected is None else selected.of(anchors[0]))
    else:
        shares = _shares(method, members, decay, weights, sigma_rel)
        state = mix(members, shares)
        if lora == "products":
            rest = () if selected is None else selected.rest
            state = average_products(members, shares, state, rest)
    if selected is None:
        return state
    kept = {name: tensor.detach().clone() for name, tensor in selected.rest.items()}
    return {name: kept.get(name, tensor) for name, tensor in state.items()}


def _shares(
    method: str,
    members: Sequence[Member],
    decay: float | None,
    weights: Sequence[float] | Tensor | None,
    sigma_rel: float | None,
) -> Sequence[float]:
    """The weight of each member."""
    if sigma_rel is not None:
        names = [member.name.partition("'")[2].rstrip("'") for member in members]
        return fitted_factors(names, sigma_rel)
    if method == "wsm":
        return decay_curve(len(members))
    return factors(len(members), decay, weights)


def _selection(
    candidates: Any, members: Sequence[Member], include: Any, exclude: Any
) -> Selected | None:
    """What is averaged, where that is not all."""
    if include is None and exclude is None and isinstance(candidates, RunResults):
        collect = candidates.settings.collect
        include, exclude = collect.include, collect.exclude
    include, exclude = as_names(include), as_names(() if exclude is None else exclude)
    if include is None and exclude == ():
        return None
    return Selected(members[-1], include, exclude)


def factors(
    n: int, decay: float | None = None, weights: Sequence[float] | Tensor | None = None
) -> list[float]:
    """The weights of ``n`` candidates: given ones, those of an exponential average, or equal ones.

    Raises:
        ValueError: Naming the argument that is outside its range.
    """
    if decay is not None:
        if not (is_real(decay) and 0 < decay < 1):
            raise ValueError(f"Invalid {decay=}. Must be in (0, 1).")
        powers = [decay ** (n - 1 - i) for i in range(n)]
        return [power / sum(powers) for power in powers]
    if weights is None:
        return [1 / n] * n
    given = [float(weight) for weight in weights]
    if len(given) != n or not all(is_real(factor) for factor in given):
        raise ValueError(
            f"Invalid weights={given}. There are {n} candidates: pass so many finite numbers."
        )
    if abs(sum(given) - 1) > 1e-2:
        warn(
            f"The weights sum to {sum(given):g}, not to 1, so the result is no average but that "
            f"many times one. Divide them by their sum if an average is meant."
        )
    return given
