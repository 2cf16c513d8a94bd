"""The subspace that candidates span: center and directions, and the maps to and from coefficients.

With candidates ``w_1..w_n`` and, per block ``b`` of parameter tensors, center ``c_b = mean_i
w_i,b`` and directions ``u_1,b..u_k,b``, the weights are (Li et al., arXiv 2205.13104v4, eq. 3, with
a center)::

    theta_b(x) = c_b + sum_j x[j, b] * u[j, b]

Every basis is a mix of the candidates, ``u[j, b] = sum_i mixing[b, j, i] * a[i, b]``, where ``a_i =
w_i - c`` (``w_i`` itself for ``orthonormal``). So the averaging weights follow from the
coefficients in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig
from lightning_twa.subspace.directions import Directions, Released
from lightning_twa.subspace.layout import ParameterLayout
from lightning_twa.subspace.tensors import to_dense, widest, without_autocast

__all__ = ["Subspace"]


class Subspace:
    """Center and directions of the candidates. Made by :func:`build_subspace`.

    Attributes:
        config: The configuration it was built with.
        layout: Names, shapes and blocks of the tensors in the flat vector of ``D`` numbers.
        local_layout: The same of the columns held here; ``layout`` unless several processes share
            the subspace.
        center: The uniform average ``c``, or the given start, flat, of the columns held here, in
            the layout's dtype.
        mixing: ``(B, k, n)`` float64 on the CPU, how each block's directions are mixed of
            candidates.
        starts_at_mean: Whether the center is the uniform average, and not other weights.
    """

    def __init__(
        self,
        config: SubspaceConfig,
        layout: ParameterLayout,
        center: Tensor,
        stored: Directions,
        mixing: Tensor,
        local_layout: ParameterLayout | None = None,
        starts_at_mean: bool = True,
    ) -> None:
        self.starts_at_mean = starts_at_mean
        self.config = config
        self.layout = layout
        self.local_layout = local_layout or layout
        self.center = center
        self.stored = stored
        self.mixing = mixing
        self._mixings: dict[torch.device, Tensor] = {}

    @property
    def num_candidates(self) -> int:
        """``n``."""
        return self.mixing.shape[2]

    @property
    def num_directions(self) -> int:
        """``k``, the largest number of directions of any block."""
        return self.mixing.shape[1]

    @property
    def num_blocks(self) -> int:
        """``B``."""
        return self.mixing.shape[0]

    @property
    def directions(self) -> Tensor:
        """``(k, D)`` the directions ``u`` as they are stored, of the columns held here, in the
        layout's dtype.

        Zero where a block has fewer than ``k``. Made anew at each call: for inspection.
        """
        return self.stored.dense()

    @property
    def nbytes(self) -> int:
        """Bytes held by center and directions."""
        return self.center.nbytes + self.stored.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """What :func:`restore_subspace` makes it again from, without the candidates: center and
        stored directions, of the columns held here, where they are kept. Not the mixing.
        """
        error = torch.tensor(self.stored.error, dtype=torch.float64, device="cpu")
        return {"center": self.center, "error": error, **self.stored.state_dict()}

    def release(self) -> None:
        """Free center and directions, for another subspace to take their room. What follows from
        coefficients alone stays: :meth:`averaging_weights`.
        """
        self.center = self.center.new_empty(0)
        self.stored = Released(self.stored)

    def __repr__(self) -> str:
        held = "" if self.local_layout is self.layout else f"columns={self.local_layout.numel}, "
        return (
            f"Subspace(basis={self.config.basis!r}, n={self.num_candidates}, "
            f"k={self.num_directions}, D={self.layout.numel}, {held}B={self.num_blocks}, "
            f"bits={self.config.bits}, bytes={self.nbytes}, device={str(self.center.device)!r}, "
            f"relative_error={self.stored.error:.3g})"
        )

    def _mixing_on(self, device: torch.device) -> Tensor:
        """:attr:`mixing` there, copied once."""
        if device.type == "cpu":
            return self.mixing
        if device not in self._mixings:
            self._mixings[device] = self.mixing.to(device=device, dtype=widest(device))
        return self._mixings[device]

    @torch.no_grad()
    def project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradient in the coefficients, ``dL/dx[j, b] = u[j, b] . g_b`` (eq. 5 of the paper).

        Args:
            gradients: One per tensor of ``local_layout``, in its order, in the tensor's shape and
                any floating-point dtype, dense or sparse; ``None`` counts as zero.

        Returns:
            ``(k, B)`` float64 (float32 on devices without that), on the device of the directions:
            of the columns held here, to be summed over processes that share the subspace.
        """
        with without_autocast(self.center.device):
            return self.stored.project([to_dense(gradient) for gradient in gradients])

    @torch.no_grad()
    def expand(self, coefficients: Tensor, out: Sequence[Tensor]) -> None:
        """Write ``theta(x)`` into tensors, without a vector of ``D`` elements in between.

        Args:
            coefficients: ``(k, B)``, any floating-point dtype and device.
            out: One per tensor of ``local_layout``, in its order and the tensor's shape; any
                floating-point dtype, to which the result is rounded.
        """
        with without_autocast(self.center.device):
            self.stored.expand(coefficients, self.center, out)

    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """The weights ``beta`` with ``theta_b = sum_i beta[i, b] * w_i``.

        Args:
            coefficients: ``(k, B)``.

        Returns:
            ``(n, B)`` on the device of the coefficients, float64 where it has that. Columns sum to
            1 in the centered bases. Of a subspace with a start of its own, by how much the weights
            differ from those of the start; columns then sum to 0.
        """
        x = coefficients.to(dtype=widest(coefficients.device))
        mix = torch.einsum("bkn,kb->nb", self._mixing_on(x.device), x)
        if self.config.basis != "orthonormal":
            # sum_i m_i (w_i - c) with c = mean(w): the mean of m comes back through the center.
            mix = mix - mix.mean(dim=0, keepdim=True)
        return mix + 1.0 / self.num_candidates if self.starts_at_mean else mix
