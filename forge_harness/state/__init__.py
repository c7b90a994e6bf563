"""The state store: content-addressed, generation by generation, durable and verified on read."""

from __future__ import annotations

from .fs import Fs, RealFs
from .records import (
    BlobRef,
    CollectReport,
    Generation,
    NewState,
    Problem,
    State,
    VerifyReport,
)
from .sealer import Sealer
from .store import Store

__all__ = [
    "BlobRef",
    "CollectReport",
    "Fs",
    "Generation",
    "NewState",
    "Problem",
    "RealFs",
    "Sealer",
    "State",
    "Store",
    "VerifyReport",
]
