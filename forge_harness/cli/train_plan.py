"""What `forge-harness train` trains: the configuration, or the run it resumes."""

from __future__ import annotations

from collections.abc import Mapping
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
    checkpoint_every: int
    sealer: Sealer | None


def plan_of(given: Arguments) -> Plan:
    """Returns what the configuration and the flags say, or the run that is resumed.

    Raises:
        UsageError: They contradict the run, or there is none.
    """
    loaded = load(given.config_file, given.flags)
    sealer = None if given.keys is None else sealer_of(given.keys)
    if given.resume:
        task, options = _saved(given.out, given.flags)
        build_model = _model_to_resume(given.out, loaded, task)
    else:
        task, options = _configured(loaded)
        build_model = _model_of(loaded, task)
    return Plan(
        task=task,
        options=options,
        build_model=build_model,
        sizes={key: value for key, value in loaded.values().items() if key.startswith("model.")},
        checkpoint_every=loaded.config.train.checkpoint_every,
        sealer=sealer,
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


def _saved(out: Path, flags: Mapping[str, Any]) -> tuple[str, TrainOptions]:
    """Returns task and options of the run in a directory; a flag may repeat, not change them."""
    from forge_harness.training import resolve_recipe
    from forge_harness.training.run_directory import TrainingDirectory

    task, options = TrainingDirectory(out).options()
    saved: dict[str, Any] = {"task": task}
    for key in ("seed", "steps", "precision", "accumulation"):
        saved[key] = getattr(options, key)
    # What was left to the recipe has a value too, and a flag may repeat it.
    recipe = resolve_recipe(task, options)
    saved |= {key: getattr(recipe, key) for key in (*_OPTIONS, *_EXTRA)}
    for dotted, value in flags.items():
        key = dotted.rpartition(".")[2]
        if key in saved and saved[key] != value:
            raise UsageError(
                f"The run in {out} has {key} {saved[key]!r}, and {value!r} was asked for; drop "
                "the option to resume it, or start a new run."
            )
    return task, options


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
