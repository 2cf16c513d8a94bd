"""What a user can set: frozen keyword-only dataclasses, checked when they are made."""

from lightning_twa.config.arguments import known_arguments
from lightning_twa.config.collect import WIDEST, CollectConfig
from lightning_twa.config.patterns import check_patterns, is_selected, matches
from lightning_twa.config.reading import as_config, as_names
from lightning_twa.config.settings import DATA, Settings
from lightning_twa.config.solver import SolverConfig, check_unit_of_steps
from lightning_twa.config.storage import StorageConfig
from lightning_twa.config.subspace import SubspaceConfig
from lightning_twa.config.values import check_choice, is_int, is_real

__all__ = [
    "DATA",
    "WIDEST",
    "CollectConfig",
    "Settings",
    "SolverConfig",
    "StorageConfig",
    "SubspaceConfig",
    "as_config",
    "as_names",
    "check_choice",
    "check_patterns",
    "check_unit_of_steps",
    "is_int",
    "is_real",
    "is_selected",
    "known_arguments",
    "matches",
]
