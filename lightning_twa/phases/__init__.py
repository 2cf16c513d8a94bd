"""What a run does, and when: it collects candidates, trains coefficients, ends with an average."""

from lightning_twa.phases.batchnorm import reestimate_batchnorm
from lightning_twa.phases.checks import check_package
from lightning_twa.phases.run import Run
from lightning_twa.phases.transitions import Event

__all__ = ["Event", "Run", "check_package", "reestimate_batchnorm"]
