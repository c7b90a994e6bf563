"""`forge-harness state`: the states of the phases, listed, verified, restored, migrated."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import (
    FiniteRange,
    NamedPath,
    WholeNumber,
    examples,
    json_option,
    keys_option,
)
from forge_harness.cli.places import audit_places, check_apart, given, keys_place
from forge_harness.cli.terminal import echo_json, say, several, table
from forge_harness.errors import DamagedStateError, ExitCode, StateError, UsageError

if TYPE_CHECKING:
    from forge_harness.integration.state_manager import StateManager
    from forge_harness.state import State, VerifyReport

_SHORT = 12


@click.group(
    "state",
    epilog=examples(
        "forge-harness state ls --root states",
        "forge-harness state verify --root states",
        "forge-harness state restore before-tuning --root states",
    ),
)
def state_group() -> None:
    """Keep the states of the phases: durable, verified, with their history."""


def _root_option(command: Callable[..., int]) -> Callable[..., int]:
    """Adds --root, --keys and --audit, and hands the command a function that opens the store."""

    @functools.wraps(command)
    def with_store(
        *,
        root: Path,
        keys: str | None,
        audit: Path | None,
        **given: Any,  # noqa: ANN401 - the command's own options
    ) -> int:
        return command(store=_Opener(root, keys, audit), **given)

    with_audit = click.option(
        "--audit",
        envvar="FORGE_HARNESS_STATE_AUDIT",
        show_envvar=True,
        type=NamedPath(),
        metavar="FILE",
        help="Audit log that records every change before it is done; needs --keys.",
    )(with_store)
    with_keys = keys_option(required=False)(with_audit)
    return click.option(
        "--root",
        required=True,
        envvar="FORGE_HARNESS_STATE_ROOT",
        show_envvar=True,
        type=NamedPath(),
        metavar="DIR",
        help="Directory of the store.",
    )(with_keys)


@dataclass(frozen=True)
class _Opener:
    """Opens the store the options name."""

    root: Path
    keys: str | None
    audit: Path | None

    @contextmanager
    def __call__(
        self, *, create: bool = False, reads: bool = False, told: bool = True
    ) -> Iterator[StateManager]:
        """Yields the open store; where nobody can write, it can still be read.

        With `told` it says on standard error that what is left is older than what was acknowledged.
        """
        if self.keys is None and self.audit is not None:
            raise UsageError(
                f"--audit {str(self.audit)!r} needs --keys, which chain and sign its records."
            )
        check_apart(audit_places(self.audit), [*given(root=self.root), *keys_place(self.keys)])
        if self.keys is None:
            with self._manager(create=create, reads=reads) as manager:
                _tell_of_losses(manager, told)
                yield manager
            return
        from forge_harness.security.audit import AuditLog
        from forge_harness.security.key_sources import load_keyring
        from forge_harness.security.sealing import KeyringSealer

        keyring = load_keyring(self.keys)
        with ExitStack() as stack:
            log = None
            if self.audit is not None:
                log = stack.enter_context(AuditLog.of_keyring(self.audit, keyring))
            sealer = KeyringSealer(keyring)
            manager = stack.enter_context(
                self._manager(create=create, reads=reads, sealer=sealer, audit=log)
            )
            _tell_of_losses(manager, told)
            yield manager

    def _manager(self, *, create: bool, reads: bool, **options: Any) -> StateManager:  # noqa: ANN401 - of StateManager
        from forge_harness.integration.state_manager import StateManager

        if reads and self.root.is_dir() and not os.access(self.root, os.W_OK):
            return StateManager(self.root, create=False, read_only=True, **options)
        try:
            return StateManager(self.root, create=create, **options)
        except StateError as error:
            # A full disk, which has no room for what SQLite puts beside the index; the kinds of
            # StateError that are a class of their own are about the store.
            if not reads or type(error) is not StateError:
                raise
            return StateManager(self.root, create=False, read_only=True, **options)


def _tell_of_losses(manager: StateManager, told: bool) -> None:
    for sentence in manager.lost() if told else ():
        say(f"Warning: {sentence}. What is left is older; verify the store.")


@state_group.command(
    "ls",
    epilog=examples(
        "forge-harness state ls --root states",
        "forge-harness state ls --root states --phase 5 --kind checkpoint",
    ),
)
@click.option("--phase", help="Only of this phase: 4, 5, 6 or a name.")
@click.option("--kind", help="Only of this kind.")
@_root_option
@json_option
def ls_command(store: _Opener, phase: str | None, kind: str | None, as_json: bool) -> int:
    """List the states and what they add up to."""
    with store(reads=True) as manager:
        states = manager.list(phase=phase, kind=kind)
        summary = manager.summary()
    if as_json:
        echo_json({"states": [asdict(state) for state in states], "summary": asdict(summary)})
        return ExitCode.PASS
    rows = [
        (s.phase, s.name, s.kind, s.generation, f"{_size(s):,}", _parents(s), s.created_at)
        for s in states
    ]
    headers = ("phase", "name", "kind", "generation", "bytes", "from", "saved")
    click.echo(table(headers, rows))
    shares = ", ".join(
        f"{phase} {count} ({count / summary.states:.1%})" for phase, count in summary.phases.items()
    )
    click.echo(
        f"{several(summary.states, 'state')}{': ' if shares else ''}{shares}; "
        f"{summary.migrated} migrated, {several(summary.generations, 'generation')}; checkpoints: "
        f"{', '.join(summary.checkpoints) or 'none'}."
    )
    return ExitCode.PASS


@state_group.command(
    "show", epilog=examples("forge-harness state show phase5 digits/step-322 --root states")
)
@click.argument("phase", metavar="PHASE")
@click.argument("name", metavar="NAME")
@click.option("--generation", type=WholeNumber(), help="As it was then (default: now).")
@_root_option
@json_option
def show_command(
    store: _Opener, phase: str, name: str, generation: int | None, as_json: bool
) -> int:
    """Show one state: files with digests, metadata, where it comes from."""
    with store(reads=True) as manager:
        state = manager.get(phase=phase, name=name, generation=generation)
    if as_json:
        echo_json(asdict(state))
        return ExitCode.PASS
    click.echo(f"{state.phase}/{state.name}: {state.kind}, generation {state.generation}")
    click.echo(f"  id {state.id}, saved {state.created_at}")
    for key, value in sorted(state.metadata.items()):
        click.echo(f"  {key}: {value}")
    for parent in state.parents:
        click.echo(f"  made from {parent}")
    rows = [(name, f"{blob.size:,}", blob.digest) for name, blob in state.files.items()]
    if rows:
        click.echo(table(("file", "bytes", "sha256"), rows))
    return ExitCode.PASS


@state_group.command(
    "save",
    epilog=examples(
        "forge-harness state save model.safetensors --phase 5 --kind weights --name digits",
        "forge-harness state save runs/digits/package --phase 5 --kind package --name digits",
    ),
)
@click.argument("source", metavar="PATH", type=NamedPath())
@click.option("--phase", required=True, help="4, 5, 6 or a name.")
@click.option("--kind", required=True, help="Kind of state; an unknown one lists the known.")
@click.option("--name", required=True, help="Of the state.")
@_root_option
def save_command(store: _Opener, source: Path, phase: str, kind: str, name: str) -> int:
    """Save the file or directory PATH; exit code 0 means that it is on disk."""
    from forge_harness.integration.state_manager import StateInput, new_state

    # Before a store is made, which a mistyped path or kind would leave behind.
    new_state(StateInput(phase=phase, kind=kind, name=name, data=source))
    with store(create=True) as manager:
        state = manager.save(phase=phase, kind=kind, name=name, data=source)
    click.echo(
        f"{state.phase}/{state.name}: generation {state.generation}, {_size(state):,} bytes."
    )
    return ExitCode.PASS


@state_group.command(
    "get", epilog=examples("forge-harness state get phase5 digits --out copy --root states")
)
@click.argument("phase", metavar="PHASE")
@click.argument("name", metavar="NAME")
@click.option("--out", required=True, type=NamedPath(), help="New directory.")
@click.option("--generation", type=WholeNumber(), help="As it was then (default: now).")
@_root_option
def get_command(store: _Opener, phase: str, name: str, out: Path, generation: int | None) -> int:
    """Write a state's files into a new directory, verified; all of them or none.

    Where the store has lost newer generations, only of a --generation that is named.
    """
    with store(reads=True) as manager:
        if generation is None and manager.lost():
            at = max((g.number for g in manager.generations()), default=0)
            raise DamagedStateError(
                f"{store.root} has lost what is newer than generation {at}, so nothing was "
                f"written: it might be what you ask for. Give --generation {at} to get what is "
                "left, or restore the store from a copy."
            )
        manager.copy_out(out, phase=phase, name=name, generation=generation)
    click.echo(f"{out}: written and verified.")
    return ExitCode.PASS


@state_group.command(
    "rm",
    epilog=examples(
        "forge-harness state rm phase5 lm/step-100 lm/step-150 --root states",
        "forge-harness state rm checkpoints before-tuning --root states",
    ),
)
@click.argument("phase", metavar="PHASE")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_root_option
def rm_command(store: _Opener, phase: str, names: tuple[str, ...]) -> int:
    """Take states out of what the store holds now; with phase `checkpoints`, labels.

    Earlier generations keep them: `restore` brings them back until `gc --retain` frees them.
    """
    with store() as manager:
        # All of them first: a mistyped one must not leave half of it done.
        for state in [manager.get(phase=phase, name=name) for name in dict.fromkeys(names)]:
            generation = manager.remove(phase=state.phase, name=state.name)
            click.echo(f"{state.phase}/{state.name}: removed in generation {generation.number}.")
    return ExitCode.PASS


@state_group.command(
    "verify",
    epilog=examples(
        "forge-harness state verify --root states",
        "forge-harness state verify --shallow --root states",
    ),
)
@click.option("--shallow", is_flag=True, help="Index and manifests only, not every content.")
@_root_option
@json_option
def verify_command(store: _Opener, shallow: bool, as_json: bool) -> int:
    """Recompute every digest; exit code 8 when something is not what was acknowledged.

    Exit code 7 when nothing is wrong and sealed contents were not opened, for want of --keys.
    """
    with store(reads=True, told=False) as manager:
        report = manager.verify(deep=not shallow)
    if as_json:
        echo_json(asdict(report))
    else:
        click.echo(_verified(report))
    if report.problems:
        return ExitCode.VERIFICATION_FAILED
    return ExitCode.PASS if report.ok else ExitCode.INCOMPLETE


def _verified(report: VerifyReport) -> str:
    counted = (
        f"{several(report.generations, 'generation')}, {several(report.states, 'state')}, "
        f"{several(report.contents, 'content')}"
    )
    found = [f"{problem.where}: {problem.what}" for problem in report.problems]
    if found:
        lines = [f"{counted}; {several(len(found), 'problem')}:", *found]
    elif report.ok:
        lines = [f"Verified: {counted}; nothing is wrong."]
    else:
        lines = [f"Incomplete: {counted}; nothing is wrong with what could be looked at."]
    return "\n".join([*lines, *_not_looked_at(report), *_foreign(report)])


def _foreign(report: VerifyReport) -> Iterator[str]:
    for path in report.foreign:
        yield f"Not of the store: {path}; move it elsewhere."


def _not_looked_at(report: VerifyReport) -> Iterator[str]:
    if report.unopened:
        yield (
            f"Not opened: {several(report.unopened, 'sealed content')}, which may be lost all the "
            "same; give --keys."
        )
    if report.unread:
        yield f"Not read: {several(report.unread, 'content')}; leave --shallow out to read them."
    if report.collected:
        them = "it" if report.collected == 1 else "them"
        yield (
            f"Collected: {several(report.collected, 'content')} that `gc` was told to free; "
            f"generations with {them} cannot be restored."
        )


@state_group.command(
    "checkpoint",
    epilog=examples("forge-harness state checkpoint before-tuning --root states"),
)
@click.argument("label", metavar="LABEL")
@_root_option
def checkpoint_command(store: _Opener, label: str) -> int:
    """Name the current state of everything; `restore` finds it, `gc` keeps it.

    A label that is taken moves here from the generation it named.
    """
    with store() as manager:
        before = manager.checkpoints().get(label)
        generation = manager.checkpoint(label)
    moved = "" if before is None else f"; it named generation {before}, which `gc` may free now"
    click.echo(f"Checkpoint {label}: generation {generation.number}{moved}.")
    return ExitCode.PASS


@state_group.command(
    "restore",
    epilog=examples(
        "forge-harness state restore before-tuning --root states",
        "forge-harness state restore 17 --root states",
    ),
)
@click.argument("target", metavar="CHECKPOINT|GENERATION")
@_root_option
def restore_command(store: _Opener, target: str) -> int:
    """Make everything what it was then, as a new generation; nothing is forgotten."""
    with store() as manager:
        generation = manager.restore(target)
    click.echo(f"Restored {target} as generation {generation.number}.")
    return ExitCode.PASS


@state_group.command(
    "gc",
    epilog=examples("forge-harness state gc --retain 20 --root states"),
)
@click.option("--retain", type=WholeNumber(min=1), help="Newest generations to keep (all).")
@click.option(
    "--grace",
    "grace_s",
    type=FiniteRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds; nothing younger is freed. 0 goes by no clock.",
)
@_root_option
@json_option
def gc_command(store: _Opener, retain: int | None, grace_s: float, as_json: bool) -> int:
    """Free what no retained generation and no checkpoint needs."""
    with store() as manager:
        report = manager.collect(retain=retain, grace_s=grace_s)
    if as_json:
        echo_json(asdict(report))
    else:
        facts = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in asdict(report).items()
        )
        click.echo(f"Collected: {facts}.")
    return ExitCode.PASS


@state_group.command(
    "migrate",
    epilog=examples(
        "forge-harness state migrate phase5 digits --to phase6 --root states",
        "forge-harness state migrate --schema --root states",
    ),
)
@click.argument("phase", metavar="[PHASE]", required=False)
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--to", "to_phase", help="Phase that takes the state over.")
@click.option("--new-name", help="Of the state there (default: the same).")
@click.option("--schema", is_flag=True, help="Bring an old store to this version's schema.")
@_root_option
def migrate_command(
    store: _Opener,
    phase: str | None,
    name: str | None,
    to_phase: str | None,
    new_name: str | None,
    schema: bool,
) -> int:
    """Take a state over into a later phase, or with --schema bring an old store up to date.

    Opening a store migrates it too; a copy of the old index is kept beside it.
    """
    if schema:
        if phase or name or to_phase:
            raise UsageError("--schema migrates the store itself; leave PHASE, NAME and --to out.")
        with store() as manager:
            count = len(manager.generations())
        click.echo(f"{store.root}: schema is current, {several(count, 'generation')}.")
        return ExitCode.PASS
    if phase is None or name is None or to_phase is None:
        raise UsageError("Name PHASE, NAME and --to PHASE, or give --schema.")
    with store() as manager:
        state = manager.migrate(phase=phase, name=name, to_phase=to_phase, new_name=new_name)
    click.echo(
        f"{state.phase}/{state.name}: generation {state.generation}, made from {_parents(state)}."
    )
    return ExitCode.PASS


def _size(state: State) -> int:
    return sum(blob.size for blob in state.files.values())


def _parents(state: State) -> str:
    return ", ".join(parent[:_SHORT] for parent in state.parents)
