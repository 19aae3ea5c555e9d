# The compiled core, made from csrc/bind.cpp. Only `_native` and `ops` call it, and they check everything that they pass.
from typing import Any

def __getattr__(name: str) -> Any: ...
