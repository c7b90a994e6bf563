"""The accelerator torch sees: name, architecture, driver, and whether it computes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AcceleratorReading:
    """The first visible device, or none."""

    kind: str
    """What `[declared] accelerator` calls it: cuda, rocm or none."""
    name: str = ""
    architecture: str = ""
    """Compute capability, for example 9.0."""
    driver: str = ""
    problem: str = ""
    """Why an integer sum on the device failed or was wrong; empty when it was right."""


def read_accelerator() -> AcceleratorReading:
    """Looks for a device and, when there is one, has it compute something exact."""
    import torch

    if not torch.cuda.is_available():
        return AcceleratorReading("none")
    properties = torch.cuda.get_device_properties(0)
    return AcceleratorReading(
        kind="rocm" if torch.version.hip else "cuda",
        name=properties.name,
        architecture=f"{properties.major}.{properties.minor}",
        driver=_driver(),
        problem=_problem(),
    )


def _problem() -> str:
    import torch

    try:
        found = int((torch.arange(1000, device="cuda", dtype=torch.int64) ** 2).sum())
    except RuntimeError as error:
        # A build without kernels for the architecture fails here, not in is_available().
        return str(error).splitlines()[0]
    return "" if found == 332_833_500 else f"the sum of squares 0 to 999 came out as {found}"


def _driver() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return text.splitlines()[0].partition(":")[2].strip()
    return "unknown"
