"""What `forge-harness train` trains: the configuration, or the run it resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_harness.cli.options import load, sealer_of
from forge_harness.errors import UsageError

if TYPE_CHECKING:
    from forge_harness.config import LoadedConfig
    from forge_harness.protocols import TrainOptions
    from forge_harness.state import Sealer
    from forge_harness.training import BuildModel

_OPTIONS = ("batch_size", "learning_rate", "clip_norm")
_OF_TEXT = ("model.heads", "model.context")
_EXTRA = ("warmup_steps", "weight_decay", "compute", "compile", "autocast")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the command was given; flags by their dotted configuration key."""

    out: Path
    from_checkpoint: Path | None
    state: Path | None
    keys: str | None
    resume: bool
    config_file: Path | None
    flags: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained, and how."""

    task: str
    options: TrainOptions
    build_model: BuildModel | None
    sizes: dict[str, Any]
    checkpoint_every: int | None
    """None: as the run that is resumed, or the default."""
    sealer: Sealer | None
    notes: tuple[str, ...]
    """What is set and does not count, as a run goes on with what it was started with."""


def plan_of(given: Arguments) -> Plan:
    """Returns what the configuration and the flags say, or the run that is resumed.

    Raises:
        UsageError: They contradict the run, or there is none.
    """
    loaded = load(given.config_file, given.flags)
    sealer = None if given.keys is None else sealer_of(given.keys)
    notes: tuple[str, ...] = ()
    if given.resume:
        task, options, notes = _saved(given.out, loaded)
        build_model = _model_to_resume(given.out, loaded, task)
    else:
        task, options = _configured(loaded)
        build_model = _model_of(loaded, task)
    _refuse_sizes_of_text(loaded, task)
    every = loaded.config.train.checkpoint_every
    return Plan(
        task=task,
        options=options,
        build_model=build_model,
        sizes={key: value for key, value in loaded.values().items() if key.startswith("model.")},
        checkpoint_every=every if "train.checkpoint_every" in loaded.given else None,
        sealer=sealer,
        notes=notes,
    )


def facts_of(given: Arguments, plan: Plan) -> dict[str, object]:
    """Returns what all ranks must have in common, by the name it has in a message."""
    import torch

    from forge_harness import __version__
    from forge_harness.training import data_digest, resolve_recipe

    return {
        "torch": torch.__version__,
        "forge-harness": __version__,
        "--out": str(given.out),
        "--resume": given.resume,
        "checkpoint_every": plan.checkpoint_every,
        "task": plan.task,
        **plan.sizes,
        **asdict(plan.options),
        **asdict(resolve_recipe(plan.task, plan.options)),
        "training data": data_digest(plan.task),
    }


def _configured(loaded: LoadedConfig) -> tuple[str, TrainOptions]:
    """Returns task and options: what the configuration gives, and the recipe for the rest."""
    from forge_harness.protocols import TrainOptions

    train = loaded.config.train
    given = {
        key.removeprefix("train."): value
        for key, value in loaded.values().items()
        if key.startswith("train.") and key in loaded.given
    }
    options = TrainOptions(
        seed=loaded.config.run.seed,
        steps=train.steps,
        precision=train.precision,
        accumulation=train.accumulation,
        extra={key: given[key] for key in _EXTRA if key in given},
        **{key: given[key] for key in _OPTIONS if key in given},
    )
    return train.task, options


def _saved(out: Path, loaded: LoadedConfig) -> tuple[str, TrainOptions, tuple[str, ...]]:
    """Returns task and options of the run in a directory, and what is set to something else.

    A flag may repeat what the run was started with, not change it; the file and the environment
    are those of other runs too, which flags may have overruled when this one began.
    """
    from forge_harness.training.run_directory import TrainingDirectory

    task, options = TrainingDirectory(out).options()
    saved = _in_force(out, task, options)
    notes = []
    for key, given in loaded.given.items():
        asked = loaded.values()[key]
        if key not in saved or saved[key] == asked:
            continue
        if given.origin == "flag":
            raise UsageError(
                f"The run in {out} has {key.rpartition('.')[2]} {saved[key]!r}, and {asked!r} was "
                "asked for; drop the option to resume it, or start a new run."
            )
        notes.append(
            f"{key} is {asked!r} {given.where}; the run in {out} goes on with {saved[key]!r}, as "
            "it was started."
        )
    return task, options, tuple(notes)


def _in_force(out: Path, task: str, options: TrainOptions) -> dict[str, Any]:
    """Returns configuration key -> value of a run; what was left to the recipe has one too."""
    from forge_harness.training import resolve_recipe
    from forge_harness.training.run_directory import TrainingDirectory

    recipe = resolve_recipe(task, options)
    saved: dict[str, Any] = {"task": task}
    saved |= {key: getattr(options, key) for key in ("steps", "precision", "accumulation")}
    saved |= {key: getattr(recipe, key) for key in (*_OPTIONS, *_EXTRA)}
    saved["warmup_steps"] = recipe.schedule_spec(options.steps).warmup_steps
    if recipe.compute is None and (record := TrainingDirectory(out).model()):
        saved["compute"] = record["compute"]
    return {"run.seed": options.seed, **{f"train.{key}": value for key, value in saved.items()}}


def _model_to_resume(out: Path, loaded: LoadedConfig, task: str) -> BuildModel | None:
    """Returns None when the run knows its model; the configuration may repeat, not change it."""
    from forge_harness.training.run_directory import TrainingDirectory

    record = TrainingDirectory(out).model()
    if record is None:
        return _model_of(loaded, task)
    saved = dict(record["config"])
    if record["family"] == "digits":
        saved["layers"] = saved.get("blocks")
    for key, value in loaded.values().items():
        name = key.removeprefix("model.")
        if key in loaded.given and name != key and saved.get(name, value) != value:
            raise UsageError(
                f"The run in {out} trains a model with {name} {saved[name]!r}, and the "
                f"configuration has {key} {value!r}; drop it to resume, or start a new run."
            )
    return None


def _refuse_sizes_of_text(loaded: LoadedConfig, task: str) -> None:
    """Refuses heads and a context for a model that has neither."""
    for key in _OF_TEXT if task.partition("#")[0] == "digits" else ():
        if key in loaded.given and loaded.values()[key] != 1:
            raise UsageError(
                f"{key} is {loaded.values()[key]!r} {loaded.given[key].where}; the model of task "
                "'digits' has neither attention heads nor a context: drop it, or train 'bytes'."
            )


def _model_of(loaded: LoadedConfig, task: str) -> BuildModel | None:
    """Returns a builder of the model the configuration describes; None for the reference one."""
    if not any(key.startswith("model.") for key in loaded.given):
        return None
    from forge_harness.model import ByteLM, ByteLMConfig, DigitsConfig, DigitsModel
    from forge_harness.protocols import Precision
    from forge_harness.training.randomness import RandomState
    from forge_harness.training.splits import CONTEXT

    sizes = loaded.config.model
    text = task.partition("#")[0] == "bytes"
    if text and sizes.context < CONTEXT:
        raise UsageError(
            f"model.context {sizes.context} is below the {CONTEXT} bytes of a sample of task "
            "'bytes'; raise it."
        )

    def build(task: str, seed: int, precision: Precision) -> DigitsModel | ByteLM:
        with RandomState(seed).active():
            if not text:
                digits = DigitsConfig(width=sizes.width, hidden=sizes.hidden, blocks=sizes.layers)
                return DigitsModel(digits, precision=precision)
            config = ByteLMConfig(
                width=sizes.width,
                layers=sizes.layers,
                heads=sizes.heads,
                hidden=sizes.hidden,
                context=sizes.context,
            )
            return ByteLM(config, precision=precision)

    return build
