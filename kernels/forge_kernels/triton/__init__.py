"""Triton kernels, one source for NVIDIA and AMD GPUs; importing `ops` needs triton."""

from __future__ import annotations

import importlib.util
import os


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def problem(device: str = "cuda") -> str:
    """Returns why the kernels cannot run on a device type, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with a GPU build of torch)"
    if device == "cpu":
        return "" if interpreted() else "Triton runs on GPUs; TRITON_INTERPRET=1 runs it on the CPU"
    if device != "cuda":
        return "Triton runs on cuda devices"
    import torch

    return "" if torch.cuda.is_available() else "no GPU is visible to torch"
