"""lmnfast in training loops: writers for the rows of a probe, and callbacks for Lightning and Hugging Face.

The callbacks are in `lmnfast.integrations.lightning` and `lmnfast.integrations.transformers`. Each module imports its package.
"""

from .writers import CSVWriter, TensorBoardWriter, WandbWriter

__all__ = ["CSVWriter", "TensorBoardWriter", "WandbWriter"]
