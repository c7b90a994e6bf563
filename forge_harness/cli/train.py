"""`forge-harness train`: trains a reference model into a directory that can be resumed."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from forge_harness.cli.directory_lock import training_into
from forge_harness.cli.options import (
    FiniteRange,
    config_option,
    examples,
    keys_option,
    load,
    sealer_of,
)
from forge_harness.cli.terminal import Spare, is_plain, say, unread
from forge_harness.errors import ExitCode, SealedStateError, UsageError

if TYPE_CHECKING:
    from forge_harness.config import LoadedConfig
    from forge_harness.protocols import StepRecord, TrainOptions
    from forge_harness.training import BuildModel

_OPTIONS = ("batch_size", "learning_rate", "clip_norm")
_EXTRA = ("warmup_steps", "weight_decay", "compute", "compile", "autocast")
_PLAIN_LINES = 10


@click.command(
    "train",
    epilog=examples(
        "forge-harness train --task digits --out runs/digits",
        "forge-harness train --task bytes --precision full --out runs/full",
        "forge-harness train --task bytes --from-checkpoint runs/full --out runs/tuned",
        "forge-harness train --task digits --from-checkpoint fixtures/models/v0.9 --out runs/on",
        "forge-harness train --resume --out runs/tuned",
        "forge-harness train --task bytes --state states --checkpoint-every 50 --out runs/kept",
        "forge-harness train --task bytes --state states --keys keys.json --out runs/sealed",
    ),
)
@click.option("--task", type=click.Choice(["digits", "bytes"]), help="What to train on.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the run; new or empty unless resuming.",
)
@click.option("--precision", type=click.Choice(["ternary", "full"]), help="Arm to train.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Of initial weights and data order.")
@click.option("--batch-size", type=int, help="Samples of one optimizer step.")
@click.option("--accumulation", type=int, help="Micro-batches of one optimizer step.")
@click.option(
    "--learning-rate", type=FiniteRange(min=0, min_open=True), help="Peak of the schedule."
)
@click.option("--compute", type=click.Choice(["exact", "int8", "fake"]), help="Ternary product.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.")
@click.option(
    "--from-checkpoint",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Start from the weights of a run, or of a checkpoint in any readable format.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="ROOT",
    help="Keep the checkpoints in this state store, under the name of DIR.",
)
@keys_option(required=False)
@click.option("--resume", is_flag=True, help="Continue the run in DIR from its newest checkpoint.")
@config_option
def train_command(
    out: Path,
    from_checkpoint: Path | None,
    state: Path | None,
    keys: str | None,
    resume: bool,
    config_file: Path | None,
    seed: int | None,
    **train: Any,  # noqa: ANN401 - the options above, by the name of their configuration key
) -> int:
    """Train a reference model: quantization-aware (ternary) or full precision.

    DIR gets one line a step in metrics.jsonl, checkpoints, the packaged weights and, last, the
    held-out quality in metrics.json. Ctrl-C, SIGTERM and SIGHUP end with exit code 2 and, once it
    trains, a checkpoint; --resume continues it bit for bit. --keys seals what --state keeps, and
    opens it again; it is not remembered.
    """
    flags = {f"train.{key}": value for key, value in train.items() if value is not None}
    if seed is not None:
        flags["run.seed"] = seed
    if resume and from_checkpoint is not None:
        raise UsageError(
            "--resume continues from the run's own checkpoint; drop --from-checkpoint."
        )
    if keys is not None and state is None and from_checkpoint is None and not resume:
        raise UsageError(
            "--keys needs --state, whose contents they seal; DIR itself is not sealed."
        )
    from forge_harness.integration.stops import interrupted_once
    from forge_harness.training import TrainingInterrupted, train_to_directory

    loaded = load(config_file, flags)
    sealer = None if keys is None else sealer_of(keys)
    if resume:
        task, options = _saved(out, flags)
        build_model = _model_to_resume(out, loaded, task)
    else:
        task, options = _configured(loaded)
        build_model = _model_of(loaded, task)
    try:
        with (
            interrupted_once(),
            training_into(out),
            _progress(f"{task} {options.precision}") as on_step,
        ):
            result = train_to_directory(
                task,
                out,
                options,
                resume=resume,
                from_checkpoint=from_checkpoint,
                checkpoint_every=loaded.config.train.checkpoint_every,
                state=state,
                sealer=sealer,
                on_step=on_step,
                on_note=say,
                build_model=build_model,
            )
    except TrainingInterrupted as interruption:
        say(str(interruption))
        return interruption.exit_code
    except SealedStateError as error:
        raise UsageError(f"{error} Give its keyring with --keys.") from error
    return _told(_sentence(result, out))


def _told(result: str) -> ExitCode:
    """Prints the result; where nobody is there to read it, the caller learns that from the code."""
    try:
        click.echo(result)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # A closed terminal. A closed pipe is EPIPE, which the group handles.
        unread(sys.stdout)
        return ExitCode.INTERRUPTED
    return ExitCode.PASS


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
    from forge_harness.training.runner import TrainingDirectory

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
    from forge_harness.training.runner import TrainingDirectory

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


@contextmanager
def _progress(label: str) -> Iterator[Callable[[StepRecord, int], None]]:
    """A bar on a terminal, ten lines otherwise; on standard error."""
    if is_plain(sys.stderr):
        yield _plain(label)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    # Rich ends the process when its output cannot be written; the training must not end with it.
    with Progress(*columns, console=Console(file=cast("TextIO", Spare(sys.stderr)))) as bar:
        task = bar.add_task(label, total=None, loss=float("nan"))

        def on_step(record: StepRecord, steps: int) -> None:
            bar.update(task, total=steps, completed=record.step + 1, loss=record.loss)

        yield on_step


def _plain(label: str) -> Callable[[StepRecord, int], None]:
    def on_step(record: StepRecord, steps: int) -> None:
        if (record.step + 1) % max(1, steps // _PLAIN_LINES) == 0 or record.step + 1 == steps:
            say(f"{label}: step {record.step + 1} of {steps}, loss {record.loss:.4f}")

    return on_step


def _sentence(result: Mapping[str, Any], out: Path) -> str:
    share, loss = 100 * result["accuracy"], result["loss"]
    return (
        f"{result['task']} {result['precision']}: accuracy {share:.2f} %, loss {loss:.4f} nats on "
        f"held-out data; see {out}"
    )
