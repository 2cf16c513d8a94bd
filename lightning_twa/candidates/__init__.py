"""Where weights wait: copies of the weights, in memory or in files, and their way into a model."""

from lightning_twa.candidates.averages import Averages
from lightning_twa.candidates.candidate import (
    Candidate,
    average_buffers_,
    check_complete,
    check_form,
    depends_on_values,
    further_names,
    is_dense,
    is_kept,
    persistent_buffers,
    varying,
)
from lightning_twa.candidates.changes import drop, misfit_of, name_files, take_anew
from lightning_twa.candidates.copying import copies_on_host
from lightning_twa.candidates.encoding import decode
from lightning_twa.candidates.files import CandidateFileError
from lightning_twa.candidates.find import check_name, find_files, unique_names
from lightning_twa.candidates.frozen import leave_out_frozen, unchanged_names
from lightning_twa.candidates.into_model import (
    copy_into,
    mean_buffers,
    put_average,
    put_back,
    put_weighted,
    total_weight,
    weighted,
    weights_and_buffers,
)
from lightning_twa.candidates.keep import keep_in_files
from lightning_twa.candidates.power_averages import PowerAverages
from lightning_twa.candidates.profiles import MEAN, decay_curve, fitted_factors, is_running
from lightning_twa.candidates.readers import (
    load_checkpoint,
    read_candidate_from,
    read_file,
    without_wrappers,
)
from lightning_twa.candidates.reference import SUFFIX, Reference, resolve
from lightning_twa.candidates.running_averages import average_name
from lightning_twa.candidates.running_mean import RunningMean
from lightning_twa.candidates.selected import averaged_names, check_selection
from lightning_twa.candidates.spectral import fit_singular_vectors_, has_singular_vectors
from lightning_twa.candidates.store import Store, check_files
from lightning_twa.candidates.subspace_files import SubspaceFiles, name_of_subspace
from lightning_twa.candidates.unchanged import same

__all__ = [
    "MEAN",
    "SUFFIX",
    "Averages",
    "Candidate",
    "CandidateFileError",
    "PowerAverages",
    "Reference",
    "RunningMean",
    "Store",
    "SubspaceFiles",
    "average_buffers_",
    "average_name",
    "averaged_names",
    "check_complete",
    "check_files",
    "check_form",
    "check_name",
    "check_selection",
    "copies_on_host",
    "copy_into",
    "decay_curve",
    "decode",
    "depends_on_values",
    "drop",
    "find_files",
    "fit_singular_vectors_",
    "fitted_factors",
    "further_names",
    "has_singular_vectors",
    "is_dense",
    "is_kept",
    "is_running",
    "keep_in_files",
    "leave_out_frozen",
    "load_checkpoint",
    "mean_buffers",
    "misfit_of",
    "name_files",
    "name_of_subspace",
    "persistent_buffers",
    "put_average",
    "put_back",
    "put_weighted",
    "read_candidate_from",
    "read_file",
    "resolve",
    "same",
    "take_anew",
    "total_weight",
    "unchanged_names",
    "unique_names",
    "varying",
    "weighted",
    "weights_and_buffers",
    "without_wrappers",
]
