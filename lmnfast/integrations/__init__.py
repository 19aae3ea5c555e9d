"""lmnfast in training loops: writers for the rows of a probe, and callbacks for Lightning and Hugging Face.

The callbacks are in `lmnfast.integrations.lightning` and `lmnfast.integrations.transformers`, each with the
package that it is for.
"""

from .writers import CSVWriter, TensorBoardWriter, WandbWriter

__all__ = ["CSVWriter", "TensorBoardWriter", "WandbWriter"]
