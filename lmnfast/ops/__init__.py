"""The custom ops, one file each; every one has a reference of the same name in ``lmnfast.reference``.

Registered by ``torch.library.define`` and ``impl``: the ``custom_op`` decorator loads torch's compiler at the first
call, two seconds that a first measurement need not take.
"""

from .._recognise import recognise as recognise  # makes the chains that the ops take
from .check_outputs import check_outputs
from .hermite_connectivity import hermite_connectivity
from .jacobian import jacobian
from .jacobian_distance import jacobian_distance
from .path_connectivity import path_connectivity
from .path_r2 import path_r2
from .spectral_entropy import spectral_entropy
from .symmetric_eigenvalues import symmetric_eigenvalues

__all__ = [
    "check_outputs",
    "hermite_connectivity",
    "jacobian",
    "jacobian_distance",
    "path_connectivity",
    "path_r2",
    "spectral_entropy",
    "symmetric_eigenvalues",
]
