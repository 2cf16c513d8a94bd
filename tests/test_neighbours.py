"""``make neighbours`` notices a model that is not the average that the callback tells of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.common import ROOT, Regressor, load_script, loader, trainer
from lightning_twa import SubspaceConfig, TWACallback

FOLDER = ROOT / "examples" / "neighbours"
comparing = load_script(FOLDER / "comparing.py")
run = load_script(FOLDER / "run.py")


def fit(tmp_path: Any, twa: TWACallback) -> Regressor:
    module = Regressor(batchnorm=True)
    trainer(tmp_path, max_epochs=8, callbacks=[twa]).fit(module, loader(), loader(32, seed=1))
    return module


@pytest.mark.parametrize("setting", comparing.SETTINGS)
def test_a_run_ends_with_the_sum_of_its_candidates(tmp_path, setting: str) -> None:
    twa = TWACallback(**comparing.SETTINGS[setting])
    module = fit(tmp_path, twa)
    assert comparing.difference(twa, module) <= comparing.TOLERANCE
    with torch.no_grad():
        next(module.parameters())[0, 0] += 0.01
    assert comparing.difference(twa, module) > 1e-4


def test_learned_coefficients_are_compared_not_those_of_the_start(tmp_path) -> None:
    twa = TWACallback(**comparing.SETTINGS["learned"])
    fit(tmp_path, twa)
    beta = twa.averaging_weights
    assert beta is not None
    assert float((beta - 1 / len(beta)).abs().max()) > 1e-3


def test_what_cannot_be_compared_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="the run ended in phase 'collect'"):
        comparing.difference(TWACallback(), Regressor())
    twa = TWACallback(subspace=SubspaceConfig(blocks="tensor"), **comparing.SETTINGS["learned"])
    module = fit(tmp_path, twa)
    with pytest.raises(ValueError, match="with averaging weights"):
        comparing.difference(twa, module)
    other = TWACallback(**comparing.SETTINGS["learned"])
    fit(tmp_path, other)
    with pytest.raises(ValueError, match="no parameter of the module is among"):
        comparing.difference(other, torch.nn.Linear(2, 2))


def test_a_wrong_model_fails_the_command(tmp_path, capsys) -> None:
    def wrong(twa: TWACallback) -> Regressor:
        module = fit(tmp_path, twa)
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        return module

    with pytest.raises(SystemExit, match="1"):
        comparing.compare("lightning-twa", TWACallback, wrong)
    out = capsys.readouterr().out
    assert out.count("TOO LARGE") == len(comparing.SETTINGS)


def test_every_project_has_its_script() -> None:
    scripts = {path.stem.removeprefix("fit_") for path in FOLDER.glob("fit_*.py")}
    assert scripts == set(run.PROJECTS)


@pytest.mark.slow
def test_the_neighbour_that_tests_install_is_run(capsys) -> None:
    pytest.importorskip("finetuning_scheduler")
    comparing_in_path = load_script(FOLDER / "fit_finetuning_scheduler.py")
    comparing_in_path.compare("finetuning-scheduler", TWACallback, comparing_in_path.fit)
    assert capsys.readouterr().out.count("largest difference") == len(comparing.SETTINGS)
