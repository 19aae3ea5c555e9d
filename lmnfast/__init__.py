"""How far a neural network is from linear on your samples: the linear mapping number of arXiv 2310.05918, by C++ and CUDA."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from ._lazy import lazy as _lazy

if TYPE_CHECKING:
    from . import plot
    from ._connectivity import connectivity
    from ._eigenvalues import eigenvalues, linear_mapping_number, nonlinear_complexity
    from ._explain import explain
    from ._group_rows import Rows
    from ._history import history
    from ._krylov import SpectralEstimate
    from ._layers import match_layers
    from ._observables import observables, register_observable
    from ._observed import Observation
    from ._ratios import negative_share, participation_ratio
    from .cutting import cut
    from .estimate import Estimate, curvature
    from .jacobian import jacobian_distances, jacobians, linear_regions
    from .penalty import Penalty
    from .probe import Probe
    from .scale import Plan, plan, solve, tiles
    from .spectrum import Measurement, lmn, measure
else:  # the same names, but torch is imported when one of them is used
    __getattr__, __dir__ = _lazy(
        globals(),
        {
            "_connectivity": "connectivity",
            "_eigenvalues": "eigenvalues linear_mapping_number nonlinear_complexity",
            "_explain": "explain",
            "_group_rows": "Rows",
            "_history": "history",
            "_krylov": "SpectralEstimate",
            "_layers": "match_layers",
            "_observables": "observables register_observable",
            "_observed": "Observation",
            "_ratios": "negative_share participation_ratio",
            "cutting": "cut",
            "estimate": "Estimate curvature",
            "jacobian": "jacobian_distances jacobians linear_regions",
            "penalty": "Penalty",
            "probe": "Probe",
            "scale": "Plan plan solve tiles",
            "spectrum": "Measurement lmn measure",
        },
    )

__version__ = _version("lmnfast")

__all__ = [
    "Estimate",
    "Measurement",
    "Observation",
    "Penalty",
    "Plan",
    "Probe",
    "Rows",
    "SpectralEstimate",
    "connectivity",
    "curvature",
    "cut",
    "eigenvalues",
    "explain",
    "history",
    "jacobian_distances",
    "jacobians",
    "linear_mapping_number",
    "linear_regions",
    "lmn",
    "match_layers",
    "measure",
    "negative_share",
    "nonlinear_complexity",
    "observables",
    "participation_ratio",
    "plan",
    "plot",
    "register_observable",
    "solve",
    "tiles",
]
