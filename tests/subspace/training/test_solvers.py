"""The optimizers of the coefficients."""

from __future__ import annotations

import torch
from reference import F64
from torch import nn

from lightning_twa.subspace import FullMatrixAdam


def test_full_matrix_adam_does_not_depend_on_rotation_or_scale_of_the_loss() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q
    gradients = torch.randn(30, 4, 2, dtype=F64)
    results = []
    for turn, scale in ((torch.eye(4, dtype=F64), 1.0), (rotation, 1.0), (rotation, 1e4)):
        x = nn.Parameter(torch.zeros(4, 2, dtype=F64))
        optimizer = FullMatrixAdam([x], lr=0.1)
        for g in gradients:
            x.grad = scale * turn @ g
            optimizer.step()
        results.append(turn.T @ x.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-10)
