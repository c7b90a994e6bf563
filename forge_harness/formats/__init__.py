"""Checkpoint formats: what a file is, its codes and scales, and the way to other formats."""

from __future__ import annotations

from .checkpoint import (
    FORMATS,
    READ_ONLY,
    Anomaly,
    Checkpoint,
    Detection,
    ModelDescription,
    ReadOptions,
    TensorInfo,
    WriteOptions,
)
from .tensors import TernaryTensor

__all__ = [
    "FORMATS",
    "READ_ONLY",
    "Anomaly",
    "Checkpoint",
    "Detection",
    "ModelDescription",
    "ReadOptions",
    "TensorInfo",
    "TernaryTensor",
    "WriteOptions",
]
