"""How the directions ``u`` are kept in memory, and their two products, ``project`` and ``expand``,
with tensors in the model's own shapes.
"""

from lightning_twa.subspace.directions.codec import GROUP
from lightning_twa.subspace.directions.dense import DenseDirections
from lightning_twa.subspace.directions.interface import Directions, Released, fill
from lightning_twa.subspace.directions.packed import PackedDirections, stored_bytes
from lightning_twa.subspace.directions.scratch import Scratch
from lightning_twa.subspace.directions.tiles import TILE, Span, pad

__all__ = [
    "GROUP",
    "TILE",
    "DenseDirections",
    "Directions",
    "PackedDirections",
    "Released",
    "Scratch",
    "Span",
    "fill",
    "pad",
    "stored_bytes",
]
