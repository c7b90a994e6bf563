"""The generator as a child process that runs one plan after another."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import site
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forge_harness.errors import GeneratorError, LoadError
from forge_harness.imports import python_program
from forge_harness.paths import resolved_path

from .metrics import MEMORY, CountersRefusedError, Server, parse, total
from .plan import SIGN, LoadPlan, bearer_token

_SIGN = SIGN.encode()
LOCUSTFILE = Path(__file__).parent / "generator" / "locustfile.py"
REFUSED = "server-refused.json"
"""The status that was answered in place of the server's counters."""
_START_S = 60.0
"""Importing locust takes 1 s on an idle core, and much longer on a busy machine."""
_GRACE_S = 30.0
_END_S = 10.0
_SAMPLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Step:
    """How far a plan is, from the generator's own clock."""

    t: float
    phase: str
    sent: int
    scheduled: int


OnStep = Callable[[Step], None]


class Generator:
    """Locust in a process group of its own; leaving the `with` block ends it.

    Args:
        log: File that Locust's output is appended to.
    """

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log
        self._log = log.open("ab")
        self._pending = b""

    def __enter__(self) -> Generator:
        environment = child_environment()
        environment["FORGE_LOAD_SESSION"] = "1"
        # Its configuration is looked for in the user's home and in the directory it starts in. What
        # Python keeps at home stays where it is: Locust itself may be there.
        folder = resolved_path(self._log_path.parent)
        environment |= {"HOME": str(folder), "PYTHONUSERBASE": site.getuserbase()}
        self._process = subprocess.Popen(
            [*locust_command(), "--headless", "-u", "1", "-r", "1", "--only-summary"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        os.set_blocking(self._stdout.fileno(), False)
        try:
            self._wait_for("ready", time.monotonic() + _START_S, None)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Process id of Locust, which leads a group of its own."""
        return self._process.pid

    def run(self, plan: LoadPlan, directory: Path, on_step: OnStep | None = None) -> None:
        """Runs a plan and leaves its files in a directory.

        Writes plan.json with its requests, the server's counters before and after (before only,
        when it does not outlive the load; server-refused.json when it refuses), memory.json when it
        has them, and what the generator wrote: records-0.jsonl, generator-0.json, locust.json.

        Raises:
            LoadError: Nothing answers at the plan's address.
            GeneratorError: The generator ended or stopped answering.
        """
        directory.mkdir(parents=True, exist_ok=True)
        watch = _Watch(server_of(plan), directory, on_step)
        watch.before()
        path = resolved_path(plan.write(directory))
        self._stdin.write(json.dumps({"plan": str(path)}).encode() + b"\n")
        self._stdin.flush()
        deadline = time.monotonic() + plan.seconds + plan.timeout_s + _GRACE_S
        self._wait_for("done", deadline, watch.step)
        watch.after()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _wait_for(self, event: str, deadline: float, on_step: OnStep | None) -> None:
        while True:
            for message in self._messages(deadline):
                if message["event"] == event:
                    return
                if message["event"] == "failed":
                    raise GeneratorError(
                        f"The load generator failed: {message['error']}. Its log: {self._log_path}"
                    )
                if message["event"] == "progress" and on_step is not None:
                    on_step(Step(**{k: v for k, v in message.items() if k != "event"}))

    def _messages(self, deadline: float) -> list[dict[str, Any]]:
        if not self._selector.select(max(deadline - time.monotonic(), 0.0)):
            raise GeneratorError(
                f"The load generator said nothing in time; its log: {self._log_path}"
            )
        data = self._stdout.read(1 << 16)
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            raise GeneratorError(
                f"The load generator ended with status {self._process.returncode} before it was "
                f"done; its log: {self._log_path}"
            )
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if not line.startswith(_SIGN):
                self._log.write(line + b"\n")
        told = [line for line in lines if line.startswith(_SIGN)]
        return [json.loads(line.removeprefix(_SIGN)) for line in told]

    def _end(self) -> None:
        """Lets it go by itself, then not."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._drain_until(time.monotonic() + _END_S)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._selector.close()
            self._stdout.close()
            self._log.close()

    def _drain_until(self, deadline: float) -> None:
        # Its closing summary must not fill the pipe while it is waited for.
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._selector.select(0.1):
                data = self._stdout.read(1 << 16)
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(max(deadline - time.monotonic(), 0.1))
                    return
                self._log.write(data)


class _Watch:
    """Reads the server's counters around a run, and its memory now and then during it."""

    def __init__(self, server: Server, directory: Path, on_step: OnStep | None) -> None:
        self._server = server
        self._directory = directory
        self._on_step = on_step
        self._phase = ""
        self._memory: list[list[float]] = []
        self._last_t = 0.0
        self._sampled = 0.0
        self._offered = False
        self._refused: int | None = None

    def before(self) -> None:
        text = self._scraped()
        self._offered = text is not None
        self._keep("server-before.prom", text)

    def step(self, step: Step) -> None:
        self._last_t = step.t
        due = step.phase != self._phase or step.t >= self._sampled + _SAMPLE_S
        if self._offered and due:
            self._phase, self._sampled = step.phase, step.t
            self._sample(step.t)
        if self._on_step is not None:
            self._on_step(step)

    def after(self) -> None:
        text = None
        if self._offered:
            # A server that did not outlive the load has no counters left; the report says so.
            with contextlib.suppress(LoadError):
                text = self._scraped(at_rest=True)
        self._keep("server-after.prom", text)
        refused = None if self._refused is None else json.dumps({"status": self._refused})
        self._keep(REFUSED, refused)
        self._remember(self._last_t, text)
        self._keep("memory.json", json.dumps(self._memory) if self._memory else None)

    def _scraped(self, *, at_rest: bool = False) -> str | None:
        try:
            return self._server.scrape(at_rest=at_rest)
        except CountersRefusedError as error:
            self._refused = error.status
            return None

    def _sample(self, t: float) -> None:
        # An overloaded server may not answer; then there is no reading at that time.
        with contextlib.suppress(LoadError):
            self._remember(t, self._server.scrape())

    def _remember(self, t: float, text: str | None) -> None:
        found = total(parse(text), MEMORY) if text is not None else None
        if found is not None:
            self._memory.append([round(t, 2), found])

    def _keep(self, name: str, text: str | None) -> None:
        path = self._directory / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text, encoding="utf-8")


def server_of(plan: LoadPlan) -> Server:
    """Returns the server that a plan loads, asked with the plan's token.

    Raises:
        LoadError: The plan's variable holds no token.
    """
    return Server(url=plan.url, ca=plan.ca, token=bearer_token(plan))


def locust_command() -> list[str]:
    """Returns the start of the command line of Locust with our locustfile."""
    return [*python_program("locust"), "-f", str(LOCUSTFILE), "--exit-code-on-error", "0"]


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of a generator: ours, without what would change Locust or slow it.

    A coverage tracer in the generator would make it late, and the run invalid.
    """
    dropped = ("LOCUST_", "COVERAGE_", "COV_CORE_")
    return {name: value for name, value in environ.items() if not name.startswith(dropped)}
