"""Forge Harness: test-and-validation harness for BitNet b1.58 quantization-aware training.

The names below load on first use (PEP 562), so that importing the package, its pytest plugin
or its command line costs neither torch nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge_harness.errors import BackendUnavailableError as BackendUnavailableError
    from forge_harness.errors import ConfigError as ConfigError
    from forge_harness.errors import ExitCode as ExitCode
    from forge_harness.errors import ForgeError as ForgeError
    from forge_harness.errors import NonFiniteError as NonFiniteError
    from forge_harness.errors import NonTernaryCodeError as NonTernaryCodeError
    from forge_harness.errors import NothingCollectedError as NothingCollectedError
    from forge_harness.errors import RunDirectoryError as RunDirectoryError
    from forge_harness.errors import SubjectError as SubjectError
    from forge_harness.errors import UsageError as UsageError
    from forge_harness.errors import VerificationError as VerificationError
    from forge_harness.evidence import Evidence as Evidence
    from forge_harness.integration.phase4_connector import Phase4Connector as Phase4Connector
    from forge_harness.integration.phase6_preparer import Phase6Preparer as Phase6Preparer
    from forge_harness.integration.pipeline_validator import PipelineValidator as PipelineValidator
    from forge_harness.integration.quality_coordinator import (
        QualityCoordinator as QualityCoordinator,
    )
    from forge_harness.integration.state_manager import StateManager as StateManager
    from forge_harness.policy import Policy as Policy
    from forge_harness.policy import load_policy as load_policy
    from forge_harness.record import RunRecord as RunRecord
    from forge_harness.subject.loader import load_subject as load_subject

__version__ = "0.1.0"

_HOMES = {
    "BackendUnavailableError": "errors",
    "ConfigError": "errors",
    "Evidence": "evidence",
    "ExitCode": "errors",
    "ForgeError": "errors",
    "NonFiniteError": "errors",
    "NonTernaryCodeError": "errors",
    "NothingCollectedError": "errors",
    "Phase4Connector": "integration.phase4_connector",
    "Phase6Preparer": "integration.phase6_preparer",
    "PipelineValidator": "integration.pipeline_validator",
    "Policy": "policy",
    "QualityCoordinator": "integration.quality_coordinator",
    "RunDirectoryError": "errors",
    "RunRecord": "record",
    "StateManager": "integration.state_manager",
    "SubjectError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "load_policy": "policy",
    "load_subject": "subject.loader",
}
"""Public name -> the module that defines it."""
_SUBPACKAGES = frozenset({"kernels", "model", "quant", "training"})
"""Modules whose functions are public: `forge_harness.quant.absmean_ternary(w)`."""

__all__ = [
    "BackendUnavailableError",
    "ConfigError",
    "Evidence",
    "ExitCode",
    "ForgeError",
    "NonFiniteError",
    "NonTernaryCodeError",
    "NothingCollectedError",
    "Phase4Connector",
    "Phase6Preparer",
    "PipelineValidator",
    "Policy",
    "QualityCoordinator",
    "RunDirectoryError",
    "RunRecord",
    "StateManager",
    "SubjectError",
    "UsageError",
    "VerificationError",
    "__version__",
    "load_policy",
    "load_subject",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562; the types are in TYPE_CHECKING
    if name in _SUBPACKAGES:
        return import_module(f"forge_harness.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'forge_harness' has no attribute {name!r}")
    value = getattr(import_module(f"forge_harness.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})
