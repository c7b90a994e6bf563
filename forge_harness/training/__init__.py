"""The reference QAT trainer: data, recipes, sessions, checkpoints, packages, quality runs."""

from .checkpoint import CheckpointError, model_weights, resume_session, save_session
from .data import (
    CanaryData,
    DataSource,
    ReferenceData,
    batch,
    data_digest,
    data_info,
    documents,
    epoch_order,
    labels,
    sample_contents,
)
from .distributed import train_distributed
from .evaluation import Evaluation, evaluate_model
from .ingredients import BuildModel, Loss, reference_model, training_loss
from .interruption import TrainingInterrupted
from .package import (
    PackageError,
    evaluate_package,
    export_package,
    load_package,
    open_package,
    package_model,
)
from .quality import quality_plan, quality_run
from .ranks import DistributedError
from .recipe import Recipe, planned_schedule, recipe_for, resolve_recipe, schedule_spec
from .run_directory import newest_checkpoint
from .runner import train_to_directory
from .session import QATSession

__all__ = [
    "BuildModel",
    "CanaryData",
    "CheckpointError",
    "DataSource",
    "DistributedError",
    "Evaluation",
    "Loss",
    "PackageError",
    "QATSession",
    "Recipe",
    "ReferenceData",
    "TrainingInterrupted",
    "batch",
    "data_digest",
    "data_info",
    "documents",
    "epoch_order",
    "evaluate_model",
    "evaluate_package",
    "export_package",
    "labels",
    "load_package",
    "model_weights",
    "newest_checkpoint",
    "open_package",
    "package_model",
    "planned_schedule",
    "quality_plan",
    "quality_run",
    "recipe_for",
    "reference_model",
    "resolve_recipe",
    "resume_session",
    "sample_contents",
    "save_session",
    "schedule_spec",
    "train_distributed",
    "train_to_directory",
    "training_loss",
]
