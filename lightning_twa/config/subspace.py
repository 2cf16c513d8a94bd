"""Which subspace the candidates span and how its coefficients are grouped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_twa.config.reading import read_fields
from lightning_twa.config.values import check_choice, check_count, check_device, is_int

__all__ = ["SubspaceConfig"]

BASES = ("pca", "candidates", "orthonormal")
PARAMETRIZATIONS = ("free", "simplex", "mask")


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """Which subspace the candidates span and how its coefficients are grouped.

    Args:
        basis: ``"pca"``: principal directions of the centered candidates, each scaled so that one
            unit of its coefficient is one standard deviation of the candidates along it.
            ``"candidates"``: the centered candidates scaled to unit norm (arXiv 2205.13104v4).
            ``"orthonormal"``: Gram-Schmidt of the uncentered candidates (the ICLR 2023 version).
        blocks: ``"global"``: one coefficient per direction for the whole model. ``"tensor"``: one
            per direction and parameter tensor. An int: consecutive tensors are grouped until a
            group holds at least so many elements.
        parametrization: ``"free"``: any averaging weights in the span. ``"simplex"``: a softmax, so
            that none is negative (learned soup). ``"mask"``: a uniform average of ``mask_size``
            candidates, which are learned (SeWA, arXiv 2502.10119). The last two need a basis with
            a center.
        mask_size: Candidates that a mask keeps; ``None`` means half of them, rounded up.
        bits: How an entry of a direction is kept: 1 to 8 bits, really packed, with one bfloat16
            scale per 128 entries; 16, bfloat16; 32, full precision. The center is always exact.
        rank: Keep only the so many largest principal directions (``basis="pca"`` only).
        group_size: With more candidates than this, they are optimized in groups of at most so many,
            one group after another, each for its share of the steps and from the weights that the
            group before it arrived at; the phase ends with the mean of what the groups arrived at.
            Memory for directions is that of a group. ``None``: all at once.
        device: Where center and directions are kept, as in ``torch.device(...)``; ``None`` means
            with the model. ``"cpu"`` keeps them off an accelerator, for slower steps.

    Raises:
        ValueError: When a value is outside its range or ``rank`` goes with another basis.
    """

    basis: Literal["pca", "candidates", "orthonormal"] = "pca"
    blocks: Literal["global", "tensor"] | int = "global"
    parametrization: Literal["free", "simplex", "mask"] = "free"
    mask_size: int | None = None
    bits: int = 32
    rank: int | None = None
    group_size: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        read_fields(self)
        check_choice("SubspaceConfig.basis", self.basis, BASES)
        self._check_parametrization()
        if self.blocks not in ("global", "tensor") and not (
            is_int(self.blocks) and self.blocks >= 1  # type: ignore[operator]
        ):
            raise ValueError(
                f"Invalid SubspaceConfig.blocks={self.blocks!r}. Must be 'global', 'tensor', or an "
                f"int >= 1, the minimum number of elements per block."
            )
        if not is_int(self.bits) or self.bits not in (*range(1, 9), 16, 32):
            raise ValueError(
                f"Invalid SubspaceConfig.bits={self.bits!r}. Must be 1 to 8, 16 or 32."
            )
        check_device("SubspaceConfig.device", self.device, "with the model")
        check_count("SubspaceConfig.rank", self.rank, 1, "keep all directions")
        check_count("SubspaceConfig.group_size", self.group_size, 2, "all at once")
        if self.rank is not None and self.basis != "pca":
            raise ValueError(
                f"SubspaceConfig.rank={self.rank} needs basis='pca', where directions are ordered "
                f"by "
                f"variance, but basis={self.basis!r}. Use CollectConfig.max_candidates to have "
                f"fewer."
            )

    def _check_parametrization(self) -> None:
        name = self.parametrization
        check_choice("SubspaceConfig.parametrization", name, PARAMETRIZATIONS)
        check_count("SubspaceConfig.mask_size", self.mask_size, 1, "half of the candidates")
        if self.mask_size is not None and name != "mask":
            raise ValueError(
                f"SubspaceConfig.mask_size={self.mask_size} needs parametrization='mask', but "
                f"parametrization={name!r}."
            )
        if name == "free":
            return
        if self.basis == "orthonormal":
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} needs a basis with a center ('pca' or "
                f"'candidates'), but basis='orthonormal'."
            )
        if self.group_size is not None:
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} does not go with "
                f"group_size={self.group_size}: a group starts from weights that are no average of "
                f"its own candidates. Use parametrization='free', or no group_size."
            )
        if self.rank is not None:
            raise ValueError(
                f"SubspaceConfig.parametrization={name!r} needs all directions, but "
                f"rank={self.rank} drops some. Use CollectConfig.max_candidates to have fewer."
            )
