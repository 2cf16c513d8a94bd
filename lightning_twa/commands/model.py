"""A user's model and data, as LightningCLI makes them, for what an average of files needs of them:
BatchNorm statistics, and a metric to choose by. This runs the user's code.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_twa.candidates import load_checkpoint
from lightning_twa.phases import reestimate_batchnorm
from lightning_twa.trainer import TrainerSwitch

__all__ = ["Setting", "load_setting", "with_statistics"]

SECTIONS = ("model", "data")
OF_TRAINER = ("accelerator", "precision")  # of a configuration; one device, whatever it says


@dataclass(frozen=True)
class Setting:
    """A model with its data.

    Args:
        module: The model.
        data: Its data; ``None``: those of the module's own hooks.
        options: For a Trainer.
    """

    module: LightningModule
    data: LightningDataModule | None
    options: Mapping[str, Any]

    def trainer(self, **kwargs: Any) -> Trainer:
        """A quiet one."""
        return Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.options,
            **kwargs,
        )


def load_setting(
    config: Path | None, module: str | None, data: str | None, newest: Path
) -> Setting:
    """Make the model and its data.

    Args:
        config: What LightningCLI saved (``config.yaml``): its sections ``model`` and ``data``.
        module: Class of the model, ``"package.file.Class"``, where the configuration names none.
        data: The same of a datamodule.
        newest: The newest checkpoint: without a configuration its hyper-parameters are the
            arguments of the model.

    Raises:
        ValueError: Saying what could not be made, and why.
        ImportError: Without jsonargparse.
    """
    try:
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise ImportError(
            'A model by its configuration needs jsonargparse: pip install "lightning-twa[cli]".'
        ) from error
    given = _read(config) if config is not None else {"model": _hyperparameters(newest)}
    sections = {key: given[key] for key in SECTIONS if given.get(key) is not None}
    module_class, data_class = _class(module, "module"), _class(data, "data")
    for name, made in (("model", module_class), ("data", data_class)):
        if made is not None and "class_path" in sections.get(name, {}):
            sections[name] = sections[name].get("init_args") or {}
    if module_class is None and "class_path" not in sections.get("model", {}):
        raise ValueError(
            f"{config or newest} does not name the class of the model. Name it with --module "
            f"package.file.Class."
        )
    if data_class is None and "data" in sections and "class_path" not in sections["data"]:
        raise ValueError(
            f"{config} does not name the class of the data. Name it with --data package.file.Class."
        )
    text = io.StringIO()
    try:
        with _importable(), contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli = LightningCLI(
                module_class,
                data_class,
                subclass_mode_model=module_class is None,
                subclass_mode_data=data_class is None,
                args=sections,
                run=False,
                save_config_callback=None,
                seed_everything_default=False,
                auto_configure_optimizers=False,
                trainer_defaults={"logger": False, "accelerator": "cpu", "devices": 1},
            )
    except (Exception, SystemExit) as error:  # of a parser, or of the user's classes
        said = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
        reason = " ".join(said[-3:]) or f"{type(error).__name__}: {error}"
        raise ValueError(
            f"The model could not be made of {config or newest} ({reason}). Pass the config.yaml "
            f"that LightningCLI saved with --config, and classes with --module and --data."
        ) from error
    trainer = given.get("trainer") or {}
    options = {k: trainer[k] for k in OF_TRAINER if trainer.get(k) is not None}
    return Setting(cli.model, cli.datamodule, options)


def with_statistics(
    setting: Setting, state: Mapping[str, Tensor], batches: int | None
) -> tuple[dict[str, Tensor], int]:
    """A state dict with BatchNorm statistics of its own weights.

    Args:
        setting: The model and its data.
        state: The average.
        batches: Training batches; ``None``: those of an epoch.

    Returns:
        The state dict, and the number of batches.

    Raises:
        ValueError: Where the model is another one, or cannot be run.
    """
    module, callback = setting.module, _Statistics(batches)
    try:
        missing, unknown = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ValueError(f"The average does not fit {type(module).__name__}: {error}") from error
    wrong = [*unknown, *(name for name in missing if name in dict(module.named_parameters()))]
    if wrong:
        raise ValueError(
            f"The average does not fit {type(module).__name__}: {wrong[0]!r} is in one of them "
            f"only. Name the class that was trained with --module."
        )
    options: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0, "callbacks": [callback]}
    try:
        with _importable(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            setting.trainer(**options).fit(module, datamodule=setting.data)
    except _Enough:
        pass
    except Exception as error:  # whatever the user's data and training_step raise
        raise ValueError(
            f"BatchNorm statistics could not be re-estimated: {type(error).__name__}: {error}. "
            f"Leave --module and --config out to write the average with stale ones."
        ) from error
    if callback.batches is None:
        reasons = [str(w.message) for w in said if "re-estimated" in str(w.message)]
        reason = "".join(reasons[:1]).partition("(")[2].partition("); they are left")[0]
        raise ValueError(
            f"BatchNorm statistics could not be re-estimated with {type(module).__name__} "
            f"({reason or 'training runs no such layer'}). Leave --module and --config out to "
            f"write the average with stale ones."
        )
    now = module.state_dict()
    kept = ("running_mean", "running_var", "num_batches_tracked")
    fitted = {n: now[n].detach().cpu() for n in state if n in now and n.split(".")[-1] in kept}
    return {**state, **fitted}, callback.batches


class _Enough(Exception):
    """Nothing is to be trained."""


class _Statistics(Callback):
    """Computes them where training would begin."""

    def __init__(self, at_most: int | None) -> None:
        self.at_most = at_most
        self.batches: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        switch = TrainerSwitch(trainer)
        known = trainer.num_training_batches
        seen = self.at_most or (int(known) if known != float("inf") else 0)
        self.batches = reestimate_batchnorm(
            trainer, pl_module, switch.user_training_loader, seen, self.at_most
        )
        raise _Enough


def _read(config: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # comes with Lightning

    try:
        content = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{config} is no YAML ({error}). Give the config.yaml of LightningCLI."
        ) from error
    except OSError as error:
        raise ValueError(f"{config} cannot be read ({error.strerror}). Check the path.") from error
    if isinstance(content, dict) and isinstance(content.get("fit"), dict):
        content = content["fit"]  # of the subcommand
    if not isinstance(content, dict) or not any(key in content for key in SECTIONS):
        raise ValueError(
            f"{config} has no section 'model' or 'data'. Give the config.yaml that LightningCLI "
            f"saved beside the logs."
        )
    return content


def _hyperparameters(newest: Path) -> dict[str, Any]:
    if newest.suffix != ".ckpt":
        return {}
    found = load_checkpoint(newest, objects=True)
    saved = found.get("hyper_parameters") if isinstance(found, Mapping) else None
    plain = (bool, int, float, str, list, dict, type(None))
    return {k: v for k, v in (saved or {}).items() if isinstance(v, plain) and k[:1] != "_"}


def _class(path: str | None, option: str) -> Any:
    if path is None:
        return None
    name, _, own = path.rpartition(".")
    with _importable():
        try:
            return getattr(importlib.import_module(name), own)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--{option} {path} cannot be imported ({error}). Give package.file.Class, from "
                f"the directory that the package is in."
            ) from error


@contextlib.contextmanager
def _importable() -> Any:
    """The working directory's files can be imported, as by ``python main.py``."""
    here = os.getcwd()  # what is imported may go elsewhere, or take it out
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
