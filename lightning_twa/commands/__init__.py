"""What the command line does: look into checkpoints, average files."""

from lightning_twa.commands.line import main

__all__ = ["main"]
