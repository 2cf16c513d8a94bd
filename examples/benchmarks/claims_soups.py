"""Claim (iii): soups of twelve fine-tuning runs of one language model.

The callback keeps a quarter of the validation data back for choosing where it trains on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from claims_data import Data, generator_of, soup_data
from claims_groups import Group, Rows
from claims_runs import evaluate, scores
from claims_tasks import Learner, Recipe, fit, pretrained
from torch import Tensor
from torch.optim import AdamW

from lightning_twa import CollectConfig, SolverConfig, SubspaceConfig, TWACallback, average

SOUP_RUNS = 12
EPOCHS = 5  # of the phase
State = dict[str, Tensor]


def soup_net(seed: int) -> Learner:
    """The module to load weights of soup runs, or an average of them, into."""
    net = copy.deepcopy(pretrained("language", seed))
    return Learner(net, Recipe(partial(AdamW, lr=1e-2)), 1)


def soup_run(seed: int, i: int, settings: dict[str, float], data: Data) -> Learner:
    """Fine-tune the language model once; each run sees other windows of the same text."""
    optimizer = partial(AdamW, lr=settings["lr"], weight_decay=settings["weight_decay"])
    recipe = Recipe(optimizer, label_smoothing=settings["smoothing"])
    epochs = int(settings["epochs"])
    module = Learner(copy.deepcopy(pretrained("language", seed)), recipe, epochs * len(data.train))
    data.train.seed = SOUP_RUNS * seed + i
    fit(module, data, epochs)
    return module


def random_settings(seed: int) -> list[dict[str, float]]:
    """Of the runs."""
    rows = torch.rand(SOUP_RUNS, 4, generator=generator_of(seed, 1004)).tolist()
    return [
        {
            "lr": 10 ** (0.7 * a - 2.7),  # 0.002 to 0.01
            "weight_decay": 10 ** (3 * b - 4),  # 0.0001 to 0.1
            "smoothing": 0.1 * c,
            "epochs": 3 + int(5 * d),
        }
        for a, b, c, d in rows
    ]


class Soup:
    """Twelve runs of a seed, and averages of them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.data, self.settings = seed, soup_data(seed), random_settings(seed)
        runs = [soup_run(seed, i, s, soup_data(seed)) for i, s in enumerate(self.settings)]
        self.states = [copy.deepcopy(run.state_dict()) for run in runs]
        nlls = [evaluate(run, *self.data.val.tensors)[1] for run in runs]
        self.best = nlls.index(min(nlls))

    def made(self, state: State) -> Learner:
        """The model with given weights."""
        module = soup_net(self.seed)
        module.load_state_dict(state)
        return module

    def score(self, state: State) -> float:
        """How good the weights are by the validation NLL."""
        return -evaluate(self.made(state), *self.data.val.tensors)[1]

    def accuracy(self, state: State) -> float:
        """How good they are by the validation accuracy."""
        return evaluate(self.made(state), *self.data.val.tensors)[0]

    def learned(self, data: str, folder: str, **settings: Any) -> Learner:
        """The phase alone."""
        for i, state in enumerate(self.states):
            torch.save(state, f"{folder}/run={i:02}.pt")
        collect = CollectConfig(checkpoints=f"{folder}/run=*.pt")
        module = soup_net(self.seed)
        twa = TWACallback(0, data=data, collect=collect, **settings)  # type: ignore[arg-type]
        fit(module, soup_data(self.seed), EPOCHS, [twa])
        return module

    def retrained(self) -> Learner:
        """The best settings on training and validation data together."""
        data = soup_data(self.seed, with_validation=True)
        return soup_run(self.seed, self.best, self.settings[self.best], data)

    def rows(self, makes: dict[str, Callable[[], Learner]]) -> Rows:
        """Make each model and test it."""
        return {title: scores(make(), self.data, "soup", 0) for title, make in makes.items()}

    def fixed(self) -> dict[str, Callable[[], Learner]]:
        """Soups whose weights are not learned."""
        states, anchor = self.states, soup_net(self.seed).state_dict()
        return {
            "best single by validation": lambda: self.made(states[self.best]),
            "uniform soup": lambda: self.made(average(states)),
            "greedy soup by accuracy": lambda: self.made(
                average(states, "greedy", score=self.accuracy)
            ),
            "greedy soup by NLL": lambda: self.made(average(states, "greedy", score=self.score)),
            "Model Stock": lambda: self.made(average(states, "model_stock", anchor=anchor)),
        }


def soups(seed: int, folder: str) -> Group:
    """TWA-v and TWA-t beside fixed soups."""
    soup = Soup(seed)
    tensors = SubspaceConfig(blocks="tensor")
    simplex = SubspaceConfig(parametrization="simplex")
    makes: dict[str, Callable[[], Learner]] = {
        "TWA-v": lambda: soup.learned("val", folder),
        "TWA-v, per tensor": lambda: soup.learned("val", folder, subspace=tensors),
        "TWA-v, simplex": lambda: soup.learned("val", folder, subspace=simplex),
        "TWA-t": lambda: soup.learned("train", folder),
        **soup.fixed(),
        "best settings, trained on train + validation": soup.retrained,
    }
    return {"rows": soup.rows(makes), "notes": {}}


def soup_study(seed: int, folder: str) -> Group:
    """Radii and blocks of TWA-v, on seeds that are not reported."""
    soup = Soup(seed)
    makes = soup.fixed()
    for name, blocks in (("", "global"), (", per tensor", "tensor")):
        for radius in (1.0, 2.0, 4.0, 8.0):
            makes[f"TWA-v{name}, radius {radius:.0f}"] = partial(
                soup.learned,
                "val",
                folder,
                subspace=SubspaceConfig(blocks=blocks),  # type: ignore[arg-type]
                solver=SolverConfig(radius=radius),
            )
    return {"rows": soup.rows(makes), "notes": {}}
