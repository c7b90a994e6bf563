"""What a subject can offer, one narrow protocol a capability.

A subject implements those it has: no base class, no registration. The suites reach the subject
through these protocols only, which is what makes them useful on a foreign model and lets a
drill put a fault in. Shape letters: N output features, K input features, B batch, T tokens.
"""

from __future__ import annotations

from .capabilities import CAPABILITIES, capabilities_of, methods_of
from .configuration import Configures, QuantizationInfo, ResolvedConfig
from .data import DataInfo, LoadsData
from .export import ExportsWeights, HoldsCheckpoint, InfersPacked
from .model import Batch, BuildsModel, ModelSpec, Precision
from .quality import Arm, MeasuresQuality, QualityRun
from .quantization import MultipliesTernary, Packs, Quantizes, QuantizesParts
from .security import AuditWriter, ContentSealer, KeepsAuditLog, SealsContent, SignsPackages
from .serving import AuditedRequest, ServerSpec, Serves
from .state import KeepsState, ReadsCheckpoints, StoreSpec
from .training import (
    Checkpoints,
    ScheduleSpec,
    ScheduleStep,
    StepRecord,
    TrainingSession,
    TrainOptions,
    Trains,
    TrainsDistributed,
)

__all__ = [
    "CAPABILITIES",
    "Arm",
    "AuditWriter",
    "AuditedRequest",
    "Batch",
    "BuildsModel",
    "Checkpoints",
    "Configures",
    "ContentSealer",
    "DataInfo",
    "ExportsWeights",
    "HoldsCheckpoint",
    "InfersPacked",
    "KeepsAuditLog",
    "KeepsState",
    "LoadsData",
    "MeasuresQuality",
    "ModelSpec",
    "MultipliesTernary",
    "Packs",
    "Precision",
    "QualityRun",
    "QuantizationInfo",
    "Quantizes",
    "QuantizesParts",
    "ReadsCheckpoints",
    "ResolvedConfig",
    "ScheduleSpec",
    "ScheduleStep",
    "SealsContent",
    "ServerSpec",
    "Serves",
    "SignsPackages",
    "StepRecord",
    "StoreSpec",
    "TrainOptions",
    "TrainingSession",
    "Trains",
    "TrainsDistributed",
    "capabilities_of",
    "methods_of",
]
