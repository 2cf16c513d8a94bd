"""What the processes of a run exchange in a step, counted at every collective."""

from __future__ import annotations

import pytest
import torch

from helpers.common import Regressor
from helpers.ddp import Wide
from helpers.resume import twa
from helpers.traffic import COLLECTIVES, traffic
from lightning_twa import SubspaceConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:TWACallback.data='val'. trains"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.'val_loss"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


def test_every_collective_is_counted() -> None:
    """One that torch adds must be counted too."""
    from torch.distributed import distributed_c10d

    other = {"new_group", "split_group", "P2POp", "all_gather_coalesced", "all_reduce_coalesced"}
    words = ("reduce", "gather", "broadcast", "scatter", "all_to_all", "send", "barrier")
    public = {n for n in distributed_c10d.__all__ if any(word in n.lower() for word in words)}
    classes = {n for n in public if n[0].isupper()}
    assert public - classes - other - set(COLLECTIVES) <= {
        "batch_isend_irecv",
        "send_object_list",
        "reduce_op",
    }


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_a_step_of_the_phase_exchanges_k_times_b_numbers_instead_of_d(tmp_path, blocks) -> None:
    module = Regressor()
    d = sum(p.numel() for p in module.parameters())
    callback = twa(subspace=SubspaceConfig(blocks=blocks))
    for steps, flag, after in traffic(tmp_path, callback, module):
        collect = [s for phase, s in steps if phase == "collect"]
        phase = [s for phase, s in steps if phase == "optimize"]
        assert len(phase) == 7  # and the step that finished the phase
        k_times_b = 2 * (1 if blocks == "global" else 4)  # of three candidates; four tensors
        assert all(s == {"all_reduce": d} for s in collect)
        assert all(s == {"all_reduce": k_times_b + 1} for s in phase), "one says who has a gradient"
        assert flag is False
        assert after is True, "the flag is given back"


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_with_shards_averages_d_gradients_and_gathers_d_weights(tmp_path, clip) -> None:
    module = Wide()
    d = sum(p.numel() for p in module.parameters())
    callback = twa(distribute="shard", subspace=SubspaceConfig(bits=4))
    scatter, gather = (
        next(name for name in names if hasattr(torch.distributed, name))
        for names in (
            ("reduce_scatter_single", "reduce_scatter_tensor"),
            ("all_gather_single", "all_gather_into_tensor"),
        )
    )
    for steps, flag, after in traffic(tmp_path, callback, module, gradient_clip_val=clip):
        phase = [s for p, s in steps if p == "optimize"]
        assert len(phase) == 7
        row = phase[0][gather]
        assert d / 2 <= row <= 1.1 * d / 2, "the longer of the two processes' columns"
        expected = {scatter: 2 * row, "all_reduce": 2 + 1, gather: row}
        if clip is not None:  # averaged by DDP, for the norm
            expected = {"all_reduce": d + 2 + 1, gather: row}
        assert all(s == expected for s in phase)
        assert flag is (clip is not None)
        assert after is True
