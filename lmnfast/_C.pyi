# The compiled core; its source is csrc/bind.cpp. Only `_native` and `ops` call it. They check all arguments before the call.
from typing import Any

def __getattr__(name: str) -> Any: ...
