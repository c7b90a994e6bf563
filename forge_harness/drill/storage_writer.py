"""Child program: commits rounds to a store and says so on its standard output.

    python -m forge_harness.drill.storage_writer ROOT OPENER [--rounds N] ...

It prints `begin R` before a commit, `ack R GENERATION` after it returned, `error R WHAT` when it
raised, and goes on with the next round. Nothing is buffered: what was printed, happened.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from forge_harness.drill import workload
from forge_harness.drill.target import open_store

if TYPE_CHECKING:
    from forge_harness.state import Store

LINGER_S = 60.0
FAILED = 9
"""Exit status when the store could not be opened; commits that fail are only printed."""


def main() -> int:
    """Opens the store and commits; returns the exit status."""
    options = _options()
    if options.fsize:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    if options.left is not None:
        _leave(options.left, options.root)
    try:
        store = open_store(options.opener, options.root, lock_timeout_s=options.lock_timeout)
    except Exception as error:
        say(f"failed {_what(error)}")
        return FAILED
    # A store on a full disk may refuse to close as well; what was acknowledged is what counts.
    with contextlib.suppress(Exception), store:
        for round_ in range(options.first, options.first + options.rounds):
            _commit(store, round_, options)
        if options.collect:
            _collect(store)
        if options.linger:
            say("done")
            time.sleep(LINGER_S)
    return 0


def say(line: str) -> None:
    """Prints a line in one system call."""
    os.write(1, f"{line}\n".encode())


def _commit(store: Store, round_: int, options: argparse.Namespace) -> None:
    states = workload.states(options.seed, round_, options.shape, prefix=options.prefix)
    say(f"begin {round_}")
    try:
        generation = store.commit(states, note=f"{options.prefix}round {round_}")
    except Exception as error:
        say(f"error {round_} {_what(error)}")
    else:
        say(f"ack {round_} {generation.number}")


def _leave(source: Path, root: Path) -> None:
    """Copies files into the store and syncs none, as a program does that is killed next."""
    for path in sorted(source.rglob("*")):
        target = root / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            continue
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(handle, path.read_bytes())
        os.close(handle)


def _collect(store: Store) -> None:
    try:
        store.collect(retain=1, grace_s=0.0)
    except Exception as error:
        say(f"error collect {_what(error)}")


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="storage_writer")
    parser.add_argument("root", type=Path)
    parser.add_argument("opener")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shape", choices=sorted(workload.SHAPES), default="mixed")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--fsize", type=int, default=0, help="RLIMIT_FSIZE in bytes")
    parser.add_argument("--lock-timeout", type=float, default=30.0)
    parser.add_argument("--linger", action="store_true", help="say done, wait to be killed")
    parser.add_argument("--left", type=Path, help="files to leave in the store, not synced")
    parser.add_argument("--collect", action="store_true", help="collect garbage at the end")
    return parser.parse_args()


if __name__ == "__main__":
    # Not sys.exit: what an interpreter does at its end is no part of what is measured.
    status = main()
    os._exit(status)
