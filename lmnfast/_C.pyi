# The compiled core, made from csrc/bind.cpp. Only `_native` and `ops` call it; `_native` says what has been checked before.
from typing import Any

def __getattr__(name: str) -> Any: ...
