"""A setting outside its range is an error that names it, its range, and what to do."""

from __future__ import annotations

import re

import pytest

from lightning_twa import CollectConfig, SolverConfig, StorageConfig, SubspaceConfig, TWACallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, float("nan"), float("inf"), True, "four"])
def test_start_epoch_is_an_epoch_or_a_fraction(value) -> None:
    message = (
        f"Invalid start_epoch={value!r}. Must be an epoch (int >= 0), "
        f"a fraction of max_epochs (float in [0, 1)), or None (phase_steps before the end)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(start_epoch=value)


@pytest.mark.parametrize("value", ["test", None, True])
def test_data_is_one_of_three(value) -> None:
    message = f"Invalid data={value!r}. Must be one of 'train', 'val', 'twa'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(data=value)


@pytest.mark.parametrize("basis", ["candidates", "orthonormal"])
def test_a_radius_needs_the_pca_basis(basis) -> None:
    message = (
        f"SubspaceConfig.basis='{basis}' needs SolverConfig.lr: only basis='pca' measures "
        f"coefficients in standard deviations, which SolverConfig.radius means."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TWACallback(subspace=SubspaceConfig(basis=basis))
    TWACallback(subspace=SubspaceConfig(basis=basis), solver=SolverConfig(lr=0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CollectConfig(start=1.5),
            "Invalid CollectConfig.start=1.5. Must be an epoch (int >= 0), "
            "a fraction of max_epochs (float in [0, 1)), or None (halfway to the phase).",
        ),
        (
            lambda: CollectConfig(every_n_epochs=0),
            "Invalid CollectConfig.every_n_epochs=0. Must be an int >= 1, or None (keep none).",
        ),
        (
            lambda: CollectConfig(every_n_train_steps=0),
            "Invalid CollectConfig.every_n_train_steps=0. Must be an int >= 1, or None "
            "(collect at epoch ends).",
        ),
        (
            lambda: CollectConfig(max_candidates=1),
            "Invalid CollectConfig.max_candidates=1. Must be an int >= 2, 'auto', or None "
            "(keep all).",
        ),
        (
            lambda: CollectConfig(every_n_epochs=2, every_n_train_steps=5),
            "CollectConfig got every_n_epochs=2 and every_n_train_steps=5. Give one of them.",
        ),
        (
            lambda: SubspaceConfig(basis="svd"),
            "Invalid SubspaceConfig.basis='svd'. Must be one of 'pca', 'candidates', "
            "'orthonormal'.",
        ),
        (
            lambda: SubspaceConfig(blocks="layer"),
            "Invalid SubspaceConfig.blocks='layer'. Must be 'global', 'tensor', or an int >= 1, "
            "the minimum number of elements per block.",
        ),
        (
            lambda: SubspaceConfig(rank=0),
            "Invalid SubspaceConfig.rank=0. Must be an int >= 1, or None (keep all directions).",
        ),
        (
            lambda: SubspaceConfig(rank=2, basis="candidates"),
            "SubspaceConfig.rank=2 needs basis='pca', where directions are ordered by variance, "
            "but basis='candidates'. Use CollectConfig.max_candidates to have fewer.",
        ),
        (
            lambda: SolverConfig(name="lbfgs"),
            "Invalid SolverConfig.name='lbfgs'. Must be one of 'full_matrix_adam', 'adamw', 'sgd', "
            "'uniform'.",
        ),
        (
            lambda: SolverConfig(schedule="poly"),
            "Invalid SolverConfig.schedule='poly'. Must be one of 'cosine', 'linear', 'step', "
            "'constant'.",
        ),
        (
            lambda: SolverConfig(lr=0.0),
            "Invalid SolverConfig.lr=0.0. Must be a number > 0, or None (by radius).",
        ),
        (
            lambda: SolverConfig(radius=-1),
            "Invalid SolverConfig.radius=-1. Must be a number > 0, or None (the default).",
        ),
        (
            lambda: SolverConfig(warmup=1),
            "Invalid SolverConfig.warmup=1. Must be a number in [0, 1).",
        ),
        (
            lambda: SolverConfig(weight_decay=-0.1),
            "Invalid SolverConfig.weight_decay=-0.1. Must be a number >= 0.",
        ),
        (
            lambda: SolverConfig(betas=(0.9, 1.0)),
            "Invalid SolverConfig.betas=(0.9, 1.0). Must be two numbers in [0, 1), such as "
            "(0.9, 0.999).",
        ),
        (
            lambda: SolverConfig(name="sgd"),
            "SolverConfig.name='sgd' needs lr: its step has the scale of the gradient, so a "
            "radius in standard deviations has no meaning. Pass lr=..., or use an Adam solver.",
        ),
        (
            lambda: SolverConfig(lr=0.1, radius=1.0),
            "SolverConfig got lr=0.1 and radius=1.0. Give one of them.",
        ),
        (
            lambda: SolverConfig(momentum=0.5),
            "SolverConfig.momentum=0.5 needs name='sgd', but name='full_matrix_adam'. Use betas.",
        ),
    ],
)
def test_a_setting_outside_its_range_is_named_with_the_range(make, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


STORAGE = {
    "Invalid StorageConfig.kind='ram'. Must be one of 'auto', 'memory', 'disk'.": {"kind": "ram"},
    "Invalid StorageConfig.dtype='float16'. Must be one of 'float32', 'bfloat16'.": {
        "dtype": "float16"
    },
    "Invalid StorageConfig.dirpath=''. Must be a directory, or None (in the Trainer's": {
        "dirpath": ""
    },
    "Invalid StorageConfig.dirpath=3. Must be a directory": {"dirpath": 3},
    "StorageConfig.dirpath='x' needs kind='disk' or 'auto', or cache_subspace=True, but kind": {
        "dirpath": "x",
        "kind": "memory",
    },
    "Invalid StorageConfig.offload_optimizer='gpu'. Must be True or False.": {
        "offload_optimizer": "gpu"
    },
    "Invalid StorageConfig.cache_subspace='disk'. Must be True or False.": {
        "cache_subspace": "disk"
    },
}


@pytest.mark.parametrize("message", STORAGE)
def test_storage_that_cannot_be(message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        StorageConfig(**STORAGE[message])


def test_distribute_must_be_one_of_three() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid distribute='rows'\. Must be one of 'auto', 'rep"
    ):
        TWACallback(distribute="rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["collect", "subspace", "solver"])
def test_a_configuration_of_another_class_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=3 must be a {name.capitalize()}Config"):
        TWACallback(**{name: 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decays": (0.9, 1.0)}, r"ema_decays=\(0.9, 1.0\). Must be different numbers"),
        ({"ema_decays": 0.9}, "ema_decays=0.9. Must be"),
        ({"ema_decays": (0.9, 0.9)}, "Must be different numbers"),
        ({"ema_decays": (0.9,), "ema_device": "nowhere"}, "ema_device='nowhere'"),
        ({"ema_device": "cpu"}, "ema_device='cpu' needs ema_decays"),
    ],
)
def test_bad_running_averages(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CollectConfig(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SubspaceConfig(group_size=1),
            "Invalid SubspaceConfig.group_size=1. Must be an int >= 2, or None (all at once).",
        ),
        (
            lambda: SubspaceConfig(group_size=3, parametrization="simplex"),
            "SubspaceConfig.parametrization='simplex' does not go with group_size=3: a group "
            "starts from weights that are no average of its own candidates. Use "
            "parametrization='free', or no group_size.",
        ),
    ],
)
def test_bad_groups(make, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


UNIFORM = SolverConfig(name="uniform")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SolverConfig(name="uniform", radius=1.0), "SolverConfig.radius=1.0 has no mean"),
        (lambda: TWACallback(solver=UNIFORM, data="val"), "data='val' has no meaning"),
        (
            lambda: TWACallback(solver=UNIFORM, collect=CollectConfig(checkpoints="x.pt")),
            r"CollectConfig.checkpoints='x.pt' has no meaning .* lightning_twa.average\(\)",
        ),
    ],
)
def test_what_has_no_meaning_without_a_phase(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("length", "steps"),
    [(1, 1), (29, 1), (240, 8), (480, 16), (960, 32), (3200, 32), (5000, 50), (10**6, 10**4)],
)
def test_a_phase_without_a_length_has_a_small_share_of_the_run(length: int, steps: int) -> None:
    assert TWACallback().settings.steps_of_phase(length) == steps
    assert TWACallback(phase_steps=7).settings.steps_of_phase(length) == 7
    assert TWACallback(start_epoch=3).settings.steps_of_phase(length) is None
    assert TWACallback().settings.steps_of_phase(None) is None
