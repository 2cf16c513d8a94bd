"""What the solver steps, and the coefficients that it means.

The solver moves raw parameters ``r``; ``x`` are the coefficients of the directions, ``beta`` the
averaging weights. ``"free"`` steps ``x`` itself (Li et al., arXiv 2205.13104v4). The others hold
``beta`` to a set of averages and go through ``x = T (beta - 1/n)``, where ``T`` is the
pseudo-inverse of the map from coefficients to averaging weights.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_twa.config import SubspaceConfig
from lightning_twa.subspace.subspace import Subspace
from lightning_twa.subspace.tensors import is_accelerator, widest

__all__ = [
    "Free",
    "Mask",
    "Parametrization",
    "Simplex",
    "kept_by_mask",
    "make_parametrization",
    "pull_back",
]

HOT, COLD = 1.0, 0.1  # temperatures of the relaxed mask at the start and at the end
EPS = {torch.float64: 1e-9, torch.float32: 1e-6}  # so far the noise stays from 0 and 1
SEED = 20502  # of the mask's noise, which is the same on all processes and in a resumed run


class Parametrization(Protocol):
    """A map from raw parameters, ``(m, B)`` float64, to coefficients ``(k, B)``.

    Attributes:
        shape: Of the raw parameters, which are zero at the uniform average.
        samples: Whether training uses other coefficients than :meth:`coefficients`.
    """

    shape: tuple[int, int]
    samples: bool

    def coefficients(self, raw: Tensor) -> Tensor:
        """The coefficients that raw parameters mean, differentiable unless ``samples``."""
        ...

    def sample(self, raw: Tensor, step: int, progress: float) -> Tensor:
        """The coefficients to train with, differentiable.

        Args:
            raw: Raw parameters.
            step: 0-based optimizer step.
            progress: Of the phase, in [0, 1].
        """
        ...

    def averaging_weights(self, raw: Tensor) -> Tensor:
        """``(n, B)`` the averaging weights that raw parameters mean."""
        ...


class Free:
    """The coefficients themselves."""

    samples = False

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.shape = (subspace.num_directions, subspace.num_blocks)

    def coefficients(self, raw: Tensor) -> Tensor:
        """They are the coefficients."""
        return raw

    def sample(self, raw: Tensor, step: int, progress: float) -> Tensor:
        """They are the coefficients."""
        return raw

    def averaging_weights(self, raw: Tensor) -> Tensor:
        """See :meth:`Subspace.averaging_weights`."""
        return self.subspace.averaging_weights(raw)


class Simplex:
    """``beta = softmax(sqrt(n) r)``: averages inside of the candidates' convex hull (learned soup,
    Wortsman et al., arXiv 2203.05482, appendix I).

    At the uniform average a step of ``r`` is as long as the step of ``x`` it makes, so a radius has
    the unit that it has for free coefficients of ``basis="pca"``.
    """

    samples = False

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.n = subspace.num_candidates
        self.shape = (self.n, subspace.num_blocks)
        # beta - 1/n = M^T x per block, M the (k, n) mixing
        inverse = torch.linalg.pinv(subspace.mixing.transpose(1, 2), rtol=1e-12)
        device = subspace.center.device
        self._inverse = inverse.to(device=device, dtype=widest(device))

    def averaging_weights(self, raw: Tensor) -> Tensor:
        """In [0, 1]; columns sum to 1."""
        return torch.softmax(self.n**0.5 * raw, dim=0)

    def coefficients(self, raw: Tensor) -> Tensor:
        """Of the average with these weights."""
        return self._of(self.averaging_weights(raw))

    def sample(self, raw: Tensor, step: int, progress: float) -> Tensor:
        """The same."""
        return self.coefficients(raw)

    def _of(self, beta: Tensor) -> Tensor:
        return torch.einsum("bkn,nb->kb", self._inverse, beta - 1.0 / self.n)


class Mask(Simplex):
    """A uniform average of ``size`` of the candidates, which are learned (SeWA, arXiv 2502.10119).

    Each candidate is kept with a probability ``p_i = sigmoid(sqrt(n) r_i + s)``, where ``s`` makes
    ``sum p = size``. Training draws relaxed masks by the Gumbel-softmax trick, ``m_i =
    sigmoid((logit p_i + noise) / temperature)`` with logistic noise and a temperature that falls
    from 1 to 0.1, and averages with ``m / sum(m)``. Everything else uses the ``size`` most
    probable candidates.
    """

    samples = True

    def __init__(self, subspace: Subspace, size: int) -> None:
        super().__init__(subspace)
        self.size = size

    def averaging_weights(self, raw: Tensor) -> Tensor:
        """``1 / size`` for the most probable, else 0; among equals the newest."""
        order = torch.sort(raw.flip(0), dim=0, descending=True, stable=True).indices
        chosen = self.n - 1 - order[: self.size]
        return torch.zeros_like(raw).scatter(0, chosen, 1.0 / self.size)

    def sample(self, raw: Tensor, step: int, progress: float) -> Tensor:
        """Of a relaxed mask; the same for the same step."""
        logits = self.n**0.5 * raw
        logits = logits + self._shift(logits)
        noise = torch.logit(_uniform(logits, SEED + step), eps=EPS[logits.dtype])
        temperature = HOT * (COLD / HOT) ** progress
        mask = torch.sigmoid((logits + noise) / temperature)
        return self._of(mask / mask.sum(dim=0, keepdim=True).clamp_min(1e-12))

    def _narrow(
        self, logits: Tensor, low: Tensor, high: Tensor, parts: int
    ) -> tuple[Tensor, Tensor]:
        """Of an interval in which the shift lies, the one of equal parts in which it does."""
        if parts == 2:
            middle = (low + high) / 2
            over = torch.sigmoid(logits + middle).sum(dim=0, keepdim=True) > self.size
            return torch.where(over, low, middle), torch.where(over, middle, high)
        edges = torch.linspace(0, 1, parts + 1, dtype=logits.dtype, device=logits.device)
        inner = edges.narrow(0, 1, parts - 1).view(-1, 1, 1)
        kept = torch.sigmoid(logits + torch.lerp(low, high, inner)).sum(dim=1, keepdim=True)
        below = (kept <= self.size).sum(dim=0).to(logits.dtype)
        return (
            torch.lerp(low, high, below / parts),
            torch.lerp(low, high, (below + 1) / parts),
        )

    def _shift(self, logits: Tensor) -> Tensor:
        """``(1, B)`` the ``s`` with ``sum sigmoid(logits + s) = size``, and its derivative."""
        with torch.no_grad():
            low = -logits.amax(dim=0, keepdim=True) - 40.0
            high = -logits.amin(dim=0, keepdim=True) + 40.0
            parts, rounds = (1024, 6) if is_accelerator(logits.device) else (2, 80)
            for _ in range(rounds):
                low, high = self._narrow(logits, low, high, parts)
            shift = (low + high) / 2
            p = torch.sigmoid(logits + shift)
            slope = (p * (1 - p)).sum(dim=0, keepdim=True).clamp_min(1e-12)
        # One step of Newton's method changes nothing, but has the derivative of the solution.
        excess = torch.sigmoid(logits + shift).sum(dim=0, keepdim=True) - self.size
        return shift - (excess - excess.detach()) / slope


def _uniform(like: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1), the same for the same seed on every device of a kind."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def make_parametrization(subspace: Subspace) -> Parametrization:
    """What the subspace's configuration names.

    Raises:
        ValueError: When a mask would keep every candidate.
    """
    config, n = subspace.config, subspace.num_candidates
    if config.parametrization == "free":
        return Free(subspace)
    if config.parametrization == "simplex":
        return Simplex(subspace)
    return Mask(subspace, kept_by_mask(config, n))


def kept_by_mask(config: SubspaceConfig, n: int) -> int:
    """How many of ``n`` candidates a mask keeps.

    Raises:
        ValueError: When that is every candidate.
    """
    size = -(-n // 2) if config.mask_size is None else config.mask_size
    if size >= n:
        raise ValueError(
            f"SubspaceConfig.mask_size={config.mask_size} keeps {size} of {n} candidates, which "
            f"leaves nothing to learn. Use a smaller mask_size, or more candidates."
        )
    return size


def pull_back(
    parametrization: Parametrization, raw: Tensor, gradient: Tensor, step: int, progress: float
) -> Tensor:
    """The gradient in the raw parameters, from that in the coefficients of their sample.

    Args:
        parametrization: The map.
        raw: ``(m, B)`` raw parameters.
        gradient: ``(k, B)``.
        step: See :meth:`Parametrization.sample`.
        progress: See :meth:`Parametrization.sample`.
    """
    if isinstance(parametrization, Free):
        return gradient
    with torch.enable_grad():
        raw = raw.detach().clone().requires_grad_()
        return torch.autograd.grad(parametrization.sample(raw, step, progress), raw, gradient)[0]
