"""The integration components, each in the module of its name in snake case.

They are imported on first use: importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge_harness.integration.phase4_connector import Phase4Connector
    from forge_harness.integration.phase6_preparer import Phase6Preparer
    from forge_harness.integration.pipeline_validator import PipelineValidator
    from forge_harness.integration.quality_coordinator import QualityCoordinator
    from forge_harness.integration.state_manager import StateManager

__all__ = [
    "Phase4Connector",
    "Phase6Preparer",
    "PipelineValidator",
    "QualityCoordinator",
    "StateManager",
]

_MODULES = {
    "Phase6Preparer": "phase6_preparer",
    "Phase4Connector": "phase4_connector",
    "PipelineValidator": "pipeline_validator",
    "QualityCoordinator": "quality_coordinator",
    "StateManager": "state_manager",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
