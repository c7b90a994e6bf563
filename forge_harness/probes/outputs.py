"""What a model answers with, which is a matter between it and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def tensors_of(output: Any) -> list[Tensor]:  # noqa: ANN401 - whatever a model answers with
    """Returns an output that is a tensor, or those among the entries of one that is not.

    Args:
        output: A tensor, or a mapping, a dataclass or a sequence with tensors among its entries.
    """
    entries = [output] if isinstance(output, Tensor) else _entries(output)
    return [entry for entry in entries if isinstance(entry, Tensor)]


def _entries(output: Any) -> Iterable[Any]:  # noqa: ANN401 - as above
    if isinstance(output, Mapping):
        return output.values()
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    entries: Iterable[Any] = output
    return entries
