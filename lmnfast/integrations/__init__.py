"""lmnfast in training loops: writers for the rows of a probe, and callbacks for Lightning and Hugging Face.

`with_llc` puts the local learning coefficients of devinterp into rows. The callbacks are in `lmnfast.integrations.lightning`
and `lmnfast.integrations.transformers`. Each module imports its package.
"""

from .devinterp import with_llc
from .writers import CSVWriter, TensorBoardWriter, WandbWriter

__all__ = ["CSVWriter", "TensorBoardWriter", "WandbWriter", "with_llc"]
