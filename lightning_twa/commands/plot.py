"""The figures of a run, from its checkpoint, as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_twa.checkpoint import read_state
from lightning_twa.figures import plot_averaging_weights, plot_held_out, plot_loss_path

__all__ = ["plot"]

# What can be drawn of a checkpoint alone, by the end of the file's name
FIGURES: Mapping[str, Callable[[Path], Any]] = {
    "weights": plot_averaging_weights,
    "heldout": plot_held_out,
    "loss-path": plot_loss_path,
}
OTHERS = (
    "not drawn: the path over the plane of the candidates, and the loss there. They need the "
    "candidates themselves: plot_path(twa) and plot_subspace(twa, ...) in the program that trains"
)


def plot(path: Path, directory: Path | None, kind: str) -> Iterator[str]:
    """Write the figures of a checkpoint; a line of text for each, also for those that cannot be
    drawn.

    Args:
        path: A checkpoint of the phase or after it.
        directory: Where to; ``None``: beside the checkpoint.
        kind: Suffix of the files.

    Raises:
        ValueError: When the checkpoint holds nothing to draw, or there is no such directory.
        ImportError: Without matplotlib.
    """
    if path.is_file() and path.suffix == ".safetensors":
        raise ValueError(
            f"{path} holds weights alone, and nothing of a run that could be drawn. Give a "
            f"checkpoint of the phase or after it (.ckpt)."
        )
    if read_state(path).get("averaging_weights") is None:
        raise ValueError(
            f"{path} was written before the phase began: there are no averaging weights to draw. "
            f"Give a checkpoint of the phase or after it."
        )
    target = path.parent if directory is None else directory
    if not target.is_dir():
        raise ValueError(f"{target} is no directory. Make it first, or write elsewhere.")
    for name, draw in FIGURES.items():
        file = target / f"{path.stem}-{name}.{kind}"
        try:
            figure = draw(path)
        except ValueError as error:
            yield f"not drawn: {file.name}. {error}"
            continue
        figure.savefig(file)
        yield f"wrote {file}"
    yield OTHERS
