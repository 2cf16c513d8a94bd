"""The greedy soup, which needs to know how good an average is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_twa.average.members import Member, State
from lightning_twa.average.sums import mix
from lightning_twa.config import check_choice
from lightning_twa.machine import say

__all__ = ["greedy", "mode_of", "validation"]


LARGE = {
    "acc", "accuracy", "ap", "auc", "auroc", "auprc", "bleu", "correct", "dice", "f1", "f1score",
    "fscore", "iou", "jaccard", "kappa", "map", "mcc", "miou", "ndcg", "precision", "psnr", "r2",
    "r2score", "recall", "reward", "rouge", "sensitivity", "specificity", "ssim", "top1", "top5",
}  # fmt: skip
SMALL = {
    "bce", "bpc", "bpd", "brier", "cer", "crossentropy", "ece", "err", "error", "fid",
    "hinge", "loss", "lpips", "mae", "mape", "mse", "msle", "nll", "perplexity", "ppl",
    "regret", "rmse", "smape", "wer",
}  # fmt: skip
# with a metric: its opposite
TURNED = {"neg", "negative", "minus", "inverse", "inv", "not", "non", "one"}


def mode_of(monitor: str, mode: str | None) -> str:
    """Whether a metric is to be small or large, as its name says where nobody else does.

    Raises:
        ValueError: Where the name says neither, or both.
    """
    check_choice("mode", mode, ("min", "max"), "by the name of the monitor")
    if mode is not None:
        return mode
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", monitor)  # valAcc
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", split) if word}
    words |= {word.rstrip("0123456789@") for word in words}
    kinds = {kind for kind, known in (("max", LARGE), ("min", SMALL)) if words & known}
    if len(kinds) != 1 or words & TURNED:
        raise ValueError(
            f"mode is missing: the name of monitor={monitor!r} does not say whether it is to be "
            f"small or large. Pass mode='min' or mode='max'."
        )
    return kinds.pop()


def greedy(members: Sequence[Member], score: Callable[[State], float]) -> State:
    """Algorithm 1 of arXiv 2203.05482."""
    scores = [_checked(score(mix([member], [1.0])), member.name) for member in members]
    order = sorted(range(len(members)), key=lambda i: (-scores[i], i))
    kept: list[int] = []
    best = -float("inf")
    for i in order:
        found, size = scores[i], len(kept) + 1
        if kept:
            trial = mix([members[j] for j in [*kept, i]], [1 / size] * size)
            found = _checked(score(trial), f"the average with {members[i].name}")
        if found >= best:
            kept, best = [*kept, i], found
    names = ", ".join(members[i].name for i in kept)
    say(f"TWA: the greedy soup has {len(kept)} of {len(members)} candidates: {names}.")
    return mix([members[i] for i in sorted(kept)], [1 / len(kept)] * len(kept))


def _checked(value: Any, of: str) -> float:
    number = float(value)
    if number != number:
        raise ValueError(f"The score of {of} is not a number. Return a number; higher is better.")
    return number


def validation(
    module: LightningModule | None,
    trainer: Trainer | None,
    dataloaders: Any,
    monitor: str | None,
    mode: str | None,
) -> Callable[[State], float]:
    """A score that is a metric of ``trainer.validate``."""
    if module is None or trainer is None or monitor is None:
        raise ValueError(
            "average(method='greedy') needs a score(state_dict) function, or module=, trainer= and "
            "monitor=, the name of a metric of trainer.validate."
        )
    larger_is_better = mode_of(monitor, mode) == "max"
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
        return metrics[name] if larger_is_better else -metrics[name]

    return score
