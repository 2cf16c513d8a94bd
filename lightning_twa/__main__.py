"""``python -m lightning_twa``."""

import sys

from lightning_twa.commands import main

if __name__ == "__main__":
    sys.exit(main())
