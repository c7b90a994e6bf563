"""How each reference task is trained, and what options may change of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.protocols import Precision, ScheduleSpec, ScheduleStep, TrainOptions
from forge_harness.quant import COMPUTES, Compute
from forge_harness.training.recipe_kinds import check_kinds
from forge_harness.training.schedule import check_schedule, schedule_steps
from forge_harness.training.splits import split_task

PROFILES = ("quick", "full", "nightly")
_MOST_SEED = 2**64 - 1
"""Torch takes no larger one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a session does that is not the model, the data or the seed.

    Learning rate and residual gain were tuned for each arm on its own, because with shared ones
    the arm they suit wins the comparison.
    """

    batch_size: int
    """Samples of one optimizer step."""
    learning_rate: float
    """Peak of the schedule."""
    schedule: Literal["two_stage", "cosine"]
    warmup_share: float
    """Share of the steps the warmup takes, unless `warmup_steps` says otherwise."""
    weight_decay: float
    """Decoupled, on matrices of linear layers only."""
    clip_norm: float
    """Largest L2 norm over all gradients; 0 never clips."""
    betas: tuple[float, float]
    """Decay rates of Adam's two moments."""
    final_fraction: float = 0.0
    boundary: float = 0.5
    warmup_steps: int | None = None
    residual_gain: float = 1.0
    """Multiplies the freshly initialised output and down projections of a reference model."""
    label_smoothing: float = 0.0
    """Of the training loss of class tasks; evaluation never smooths."""
    compute: Compute | None = None
    """Arithmetic of the ternary layers; None leaves that of the model."""
    autocast: bool = False
    """bf16 autocast of what is left in full precision (attention, embedding, head)."""
    compile: bool = False
    """torch.compile of the forward and backward; needs a C++ compiler at run time."""

    def schedule_spec(self, steps: int) -> ScheduleSpec:
        """Returns the schedule of a run of `steps` optimizer steps.

        Raises:
            ConfigError: A value is out of its range.
        """
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(round(self.warmup_share * steps), steps - 1)
        spec = ScheduleSpec(
            kind=self.schedule,
            peak=self.learning_rate,
            warmup_steps=warmup,
            total_steps=steps,
            weight_decay=self.weight_decay,
            boundary=self.boundary,
            final_fraction=self.final_fraction,
        )
        check_schedule(spec)
        return spec


def recipe_for(task: str, precision: Precision = "ternary", profile: str = "quick") -> Recipe:
    """Returns the tuned recipe of a task.

    Args:
        task: `digits` or `bytes`, a variant allowed.
        precision: The arm; each has its own best learning rate.
        profile: `quick`, or `full` and `nightly` for the longer run.

    Raises:
        ConfigError: A name is unknown.
    """
    name, variant = split_task(task)
    if precision not in ("ternary", "full"):
        raise ConfigError(unknown_choice("precision", precision, ("ternary", "full")))
    if profile not in PROFILES:
        raise ConfigError(unknown_choice("profile", profile, PROFILES), key="profile")
    if name == "digits":
        return _DIGITS
    size = "quick" if profile == "quick" else "full"
    return _BYTES[(variant or size, precision)]


def resolve_recipe(task: str, options: TrainOptions) -> Recipe:
    """Returns the recipe of a session: that of the task, changed by its options.

    `options.extra` may hold `profile` and any field of `Recipe` that has no option of its own.

    Raises:
        ConfigError: An option or key is unknown or out of its range.
    """
    extra = dict(options.extra)
    recipe = recipe_for(task, options.precision, extra.pop("profile", "quick"))
    named: dict[str, Any] = {
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "clip_norm": options.clip_norm,
    }
    changes = {key: value for key, value in named.items() if value is not None}
    recipe = replace(recipe, **changes, **_checked(extra, taken=set(named)))
    given = ("seed", "steps", "accumulation", "fixed_batch")
    check_kinds(asdict(recipe) | {key: getattr(options, key) for key in given})
    _check_ranges(recipe, options)
    return recipe


def schedule_spec(task: str, options: TrainOptions) -> ScheduleSpec:
    """Returns the schedule a session of these options declares (see `Trains.schedule_spec`)."""
    return resolve_recipe(task, options).schedule_spec(options.steps)


def planned_schedule(task: str, options: TrainOptions) -> list[ScheduleStep]:
    """Returns the plan of every step (see `Trains.planned_schedule`)."""
    return schedule_steps(schedule_spec(task, options))


def _checked(extra: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    known = {field.name for field in fields(Recipe)} - taken
    for key in extra:
        if key not in known:
            raise ConfigError(unknown_choice("training option", key, known), key=key)
    return dict(extra)


def _check_ranges(recipe: Recipe, options: TrainOptions) -> None:
    if not 0 <= options.seed <= _MOST_SEED:
        raise ConfigError(f"seed {options.seed} must be from 0 to {_MOST_SEED}.", key="seed")
    _check_positive("steps", options.steps)
    _check_positive("batch_size", recipe.batch_size)
    _check_positive("accumulation", options.accumulation)
    if options.accumulation > recipe.batch_size:
        raise ConfigError(
            f"accumulation {options.accumulation} exceeds the batch of {recipe.batch_size} "
            "samples it splits; lower it or enlarge batch_size.",
            key="accumulation",
        )
    if not recipe.clip_norm >= 0:  # Written so that NaN is refused too.
        raise ConfigError(
            f"clip_norm {recipe.clip_norm!r} must be at least 0, which never clips.",
            key="clip_norm",
        )
    if recipe.compute is not None and recipe.compute not in COMPUTES:
        raise ConfigError(unknown_choice("compute mode", recipe.compute, COMPUTES), key="compute")
    recipe.schedule_spec(options.steps)


def _check_positive(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key} {value!r} must be at least 1.", key=key)


_DIGITS = Recipe(
    batch_size=64,
    learning_rate=3e-3,
    schedule="two_stage",
    warmup_share=0.05,
    weight_decay=0.05,
    clip_norm=1.0,
    betas=(0.9, 0.98),
)
_TEXT = Recipe(
    batch_size=4,
    learning_rate=2e-3,
    schedule="cosine",
    warmup_share=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
    betas=(0.9, 0.95),
    final_fraction=0.02,
)
_LONG_TEXT = replace(_TEXT, batch_size=16, warmup_share=0.035, residual_gain=0.2)
_BYTES = {
    ("small", "ternary"): replace(_TEXT, learning_rate=5e-3),
    ("small", "full"): replace(_TEXT, learning_rate=3e-3, residual_gain=0.2),
    ("quick", "ternary"): _TEXT,
    ("quick", "full"): replace(_TEXT, learning_rate=1e-3, residual_gain=0.2),
    ("full", "ternary"): replace(_LONG_TEXT, learning_rate=1.5e-3),
    ("full", "full"): replace(_LONG_TEXT, learning_rate=1e-3),
}
