"""`forge-harness train`: trains a reference model into a directory that can be resumed."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from forge_harness.cli.directory_lock import training_into
from forge_harness.cli.options import (
    FiniteRange,
    NamedPath,
    WholeNumber,
    config_option,
    examples,
    keys_option,
)
from forge_harness.cli.terminal import Spare, is_plain, say, unread
from forge_harness.cli.train_plan import Arguments, facts_of, plan_of
from forge_harness.errors import ExitCode, SealedStateError, UsageError

if TYPE_CHECKING:
    from forge_harness.protocols import StepRecord
    from forge_harness.training.parallel import Parallel
    from forge_harness.training.ranks import Ranks

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
        "torchrun --nproc-per-node 2 -m forge_harness train --task bytes --parallel ddp --out lm",
    ),
)
@click.option("--task", type=click.Choice(["digits", "bytes"]), help="What to train on.")
@click.option(
    "--out",
    required=True,
    type=NamedPath(),
    metavar="DIR",
    help="Directory of the run; new or empty unless resuming.",
)
@click.option("--precision", type=click.Choice(["ternary", "full"]), help="Arm to train.")
@click.option("--steps", type=WholeNumber(), help="Optimizer steps.")
@click.option("--seed", type=WholeNumber(), help="Of initial weights and data order.")
@click.option("--batch-size", type=WholeNumber(), help="Samples of one optimizer step.")
@click.option("--accumulation", type=WholeNumber(), help="Micro-batches of one optimizer step.")
@click.option(
    "--learning-rate", type=FiniteRange(min=0, min_open=True), help="Peak of the schedule."
)
@click.option("--compute", type=click.Choice(["exact", "int8", "fake"]), help="Ternary product.")
@click.option("--checkpoint-every", type=WholeNumber(), help="Steps between checkpoints.")
@click.option(
    "--from-checkpoint",
    type=NamedPath(),
    metavar="PATH",
    help="Start from the weights of a run, or of a checkpoint in any readable format.",
)
@click.option(
    "--state",
    type=NamedPath(),
    metavar="ROOT",
    help="Keep the checkpoints in this state store, under the name of DIR.",
)
@keys_option(required=False)
@click.option("--resume", is_flag=True, help="Continue the run in DIR from its newest checkpoint.")
@click.option(
    "--parallel",
    type=click.Choice(["ddp", "fsdp2"]),
    help="Train as one of the ranks torchrun started: whole models, or sharded ones.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What each rank of --parallel computes on.",
)
@config_option
def train_command(
    out: Path,
    from_checkpoint: Path | None,
    state: Path | None,
    keys: str | None,
    resume: bool,
    parallel: Parallel | None,
    device: str,
    config_file: Path | None,
    seed: int | None,
    **train: Any,  # noqa: ANN401 - the options above, by the name of their configuration key
) -> int:
    """Train a reference model: quantization-aware (ternary) or full precision.

    DIR gets one line a step in metrics.jsonl, checkpoints, the packaged weights and, last, the
    held-out quality in metrics.json. Ctrl-C, SIGTERM and SIGHUP end with exit code 2 and, once it
    trains, a checkpoint; --resume continues it bit for bit. --keys seals what --state keeps, and
    opens it again; it is not remembered. Under torchrun, --parallel deals each batch to the ranks;
    rank 0 writes DIR, and --resume goes on with any number of them.
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
    if device != "cpu" and parallel is None:
        raise UsageError(
            "--device cuda needs --parallel; for one GPU start one rank: `torchrun "
            "--nproc-per-node 1 -m forge_harness train --parallel ddp --device cuda ...`."
        )
    from forge_harness.integration.stops import interrupted_once
    from forge_harness.training import TrainingInterrupted
    from forge_harness.training.ranks import ToldByFirst

    arguments = Arguments(out, from_checkpoint, state, keys, resume, config_file, flags)
    try:
        with interrupted_once(), _ranks(parallel, device) as ranks:
            result = _train(arguments, ranks)
    except ToldByFirst as told:
        return told.exit_code
    except TrainingInterrupted as interruption:
        say(str(interruption))
        return interruption.exit_code
    except SealedStateError as error:
        raise UsageError(f"{error} Give its keyring with --keys.") from error
    return _told(_sentence(result, out)) if ranks.rank == 0 else ExitCode.PASS


@contextmanager
def _ranks(parallel: Parallel | None, device: str) -> Iterator[Ranks]:
    """Yields the ranks of the command: those torchrun started, or this process."""
    if parallel is None:
        from forge_harness.training.ranks import OneProcess, refuse_alone_among_ranks

        refuse_alone_among_ranks()
        yield OneProcess()
        return
    from forge_harness.training.torchrun import joined

    with joined(parallel, device) as ranks:
        yield ranks


def _train(given: Arguments, ranks: Ranks) -> dict[str, Any]:
    """Trains as one of the ranks, of which the first alone locks DIR, and shows progress."""
    from forge_harness.training import train_to_directory
    from forge_harness.training.ranks import refuse_disagreement

    plan = ranks.everywhere(lambda: plan_of(given))
    if ranks.world_size > 1:
        refuse_disagreement(ranks, ranks.everywhere(lambda: facts_of(given, plan)))
    if ranks.rank == 0:
        for note in plan.notes:
            say(note)
    label = f"{plan.task} {plan.options.precision}"
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(training_into(given.out)))
        on_step = stack.enter_context(_progress(label)) if ranks.rank == 0 else None
        return train_to_directory(
            plan.task,
            given.out,
            plan.options,
            resume=given.resume,
            from_checkpoint=given.from_checkpoint,
            checkpoint_every=plan.checkpoint_every,
            state=given.state,
            sealer=plan.sealer,
            on_step=on_step,
            on_note=say,
            build_model=plan.build_model,
            ranks=ranks,
        )


def _told(result: str) -> ExitCode:
    """Prints the result; where nobody is there to read it, the caller learns that from the code."""
    try:
        click.echo(result)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # A closed terminal. A closed pipe changes no exit code: the group sees to it.
        unread(sys.stdout)
        return ExitCode.INTERRUPTED
    return ExitCode.PASS


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
