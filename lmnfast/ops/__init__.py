"""The custom ops, one file each. Every op has a reference of the same name in ``lmnfast.reference``.

The ops are registered by ``torch.library.define`` and ``impl``. The ``custom_op`` decorator would load torch's compiler at the
first call, which takes two seconds.
"""

import sys

from .._chain import Activation as Activation  # an argument of block_coefficients
from .._recognise import recognise as recognise  # returns the chains that are the ops' arguments
from .block_coefficients import block_coefficients as block_coefficients
from .check_outputs import check_outputs as check_outputs
from .hermite_connectivity import hermite_connectivity as hermite_connectivity
from .jacobian import jacobian as jacobian
from .jacobian_distance import jacobian_distance as jacobian_distance
from .path_connectivity import path_connectivity as path_connectivity
from .path_connectivity_backward import path_connectivity_backward as path_connectivity_backward
from .path_r2 import path_r2 as path_r2
from .spectral_entropy import spectral_entropy as spectral_entropy
from .symmetric_eigenvalues import symmetric_eigenvalues as symmetric_eigenvalues

# The ops: every name imported here from a module of the same name.
__all__ = [name for name in dir() if f"{__name__}.{name}" in sys.modules and not name.startswith("_")]
