"""Changing what a model returns, whatever holds its tensors."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def changed_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, int]:
    """Returns a copy with all floating tensors changed, and their number."""
    if isinstance(value, Tensor):
        return (change(value), 1) if value.is_floating_point() else (value, 0)
    if isinstance(value, tuple | list):
        found = [changed_tensors(item, change) for item in value]
        items = [item for item, _ in found]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items), sum(n for _, n in found)
    if isinstance(value, Mapping):
        parts, store = dict(value), operator.setitem
    elif dataclasses.is_dataclass(value):
        parts, store = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, setattr
    else:
        return value, 0
    # A copy of the same type: outputs of transformers are mappings with attributes.
    result, total = copy.copy(value), 0
    for name, part in parts.items():
        item, count = changed_tensors(part, change)
        if count:
            store(result, name, item)
            total += count
    return result, total
