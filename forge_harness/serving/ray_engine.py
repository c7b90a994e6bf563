"""The same application as a Ray Serve deployment: replicas of it behind Ray's proxy.

Each replica is a process with its own engine, admission and counts; Ray spreads requests over them,
replaces those that die or report that they have failed, and streams their answers. Everything
runs on this machine, and Ray's proxy speaks plain HTTP, so there is no TLS here.

Needs `ray[serve]` (extra `ray`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_harness.durable import write_durably
from forge_harness.errors import ExitCode, UsageError
from forge_harness.paths import resolved_path

from .core import Core
from .guard import GuardSpec
from .health import State
from .package import load_served
from .server import listen, stop_signals
from .settings import Settings, sized

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "forge-harness"
REPLICA_HEADER = b"x-forge-replica"
_REQUEST_ID = b"x-request-id"
_POLL_S = 0.02
_START_S = 60.0
_GRACE_S = 5.0
"""For Ray, over the time a drain may take."""
_VERSION = "1"
_OBJECT_STORE_BYTES = 100 * 2**20
"""Requests and answers do not pass through it."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What a replica is made of; goes to its process.

    Attributes:
        package: Directory of the package.
        settings: Limits; those that are the model's are set by the replica.
        guard: Tokens, roles, audit.
        max_batch: None: what suits the model.
        deadline_ms: None: what suits the model.
        driver: Process that ends everything when a drain is asked for.
        notes: Directory in which replicas leave how many requests they did not answer.
        url: Of the proxy.
    """

    package: str
    settings: Settings
    guard: GuardSpec
    max_batch: int | None
    deadline_ms: int | None
    driver: int
    notes: str
    url: str


class Replica:
    """One process of the deployment; decorated by `_deployment`."""

    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        context = import_module("ray.serve").get_replica_context()
        self._name = context.replica_id.unique_id
        self._note = Path(spec.notes) / f"{self._name}.json"
        served = load_served(Path(spec.package), threads=spec.settings.threads)
        settings = sized(spec.settings, served, spec.max_batch, spec.deadline_ms)
        self._guard = spec.guard.open()
        self._core = Core(
            served, settings, self._guard, drain=lambda actor: os.kill(spec.driver, signal.SIGTERM)
        )
        self._core.url = spec.url
        self._core.record("serve.start", {"model": served.name, "replica": self._name})
        self._application = self._core.application()
        await self._core.engine.start()
        until = time.monotonic() + _START_S
        while not self._core.health.is_ready:
            if time.monotonic() > until:
                raise RuntimeError(f"The replica is not ready: {self._core.health.reason}.")
            await asyncio.sleep(_POLL_S)

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Begins the drain, when it is told to."""
        if config.get("draining"):
            self._core.health.become(State.DRAINING, "the deployment ends")
            # Until it has ended in order: one that is killed meanwhile leaves this.
            self._write_note(self._core.admission.in_flight)

    async def check_health(self) -> None:
        """Has this replica replaced when its engine has given up.

        Raises:
            RuntimeError: It has.
        """
        if self._core.health.state is State.FAILED:
            raise RuntimeError(f"The replica has failed: {self._core.health.reason}.")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application, whose answers name the replica."""
        name = (REPLICA_HEADER, self._name.encode())

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            given = [header for header in scope.get("headers", ()) if header[0] == _REQUEST_ID]

            async def send_named(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # Ray's proxy, which gave or passed on the id, adds it again.
                    own = [header for header in message["headers"] if header not in given]
                    message["headers"] = [*own, name]
                await send(message)

            await self._application(scope, receive, send_named)

        return named

    async def __del__(self) -> None:
        unanswered = self._core.abandon_all()
        detail = {"unanswered": unanswered, "replica": self._name}
        self._core.record("serve.stop", detail, is_last=True)
        await self._core.engine.stop()
        self._guard.close()
        self._write_note(unanswered)

    def _write_note(self, unanswered: int) -> None:
        # Whole or as it was: Ray may kill this process while it writes.
        write_durably(self._note, json.dumps({"unanswered": unanswered}).encode())


def serve_with_ray(
    package: Path,
    settings: Settings,
    guard: GuardSpec,
    *,
    replicas: int,
    max_batch: int | None = None,
    deadline_ms: int | None = None,
    on_ready: Callable[[dict[str, object]], None] = lambda line: None,
) -> ExitCode:
    """Serves a package with replicas until SIGTERM, SIGINT or SIGHUP, then drains them.

    Args:
        package: Directory of the package.
        settings: Limits of each replica; TLS is refused.
        guard: Tokens, roles, audit.
        replicas: Processes.
        max_batch: Of each; None: what suits the model.
        deadline_ms: Longest time of a request; None: what suits the model.
        on_ready: Called with the line that says so.

    Returns:
        PASS, or INCOMPLETE when a replica ended with accepted requests unanswered.

    Raises:
        UsageError: Ray is not installed, TLS is asked for, or the address cannot be used.
    """
    if settings.tls_cert is not None:
        raise UsageError(
            "--engine ray does not speak TLS (Ray's proxy has none); drop --tls-cert and "
            "--tls-key, or use --engine uvicorn."
        )
    if not settings.is_loopback:
        raise UsageError(
            f"--engine ray listens on this machine only, not on {settings.host}; drop --host, or "
            "use --engine uvicorn."
        )
    name = load_served(package).name  # what cannot be served is said now, and not by a replica
    guard.open().close()
    stopped, stops = threading.Event(), stop_signals()
    with tempfile.TemporaryDirectory(prefix="forge-ray-") as notes:
        port = _free_port(settings.host, settings.port)
        url = f"http://{settings.host}:{port}"
        with _cluster(replicas, settings.host, port, stops) as serve:
            spec = ReplicaSpec(
                str(resolved_path(package)),
                replace(settings, port=port),
                guard,
                max_batch,
                deadline_ms,
                os.getpid(),
                notes,
                url,
            )
            _on_signals(stops, stopped.set)
            deployment = _deployment(serve, settings, replicas)
            serve.run(deployment.bind(spec), name=NAME, route_prefix="/")
            on_ready({"ready": True, "url": url, "pid": os.getpid(), "model": name})
            stopped.wait()
            draining = deployment.options(user_config={"draining": True})
            serve.run(draining.bind(spec), name=NAME, route_prefix="/")
            serve.delete(NAME)
        left = [json.loads(note.read_bytes()) for note in Path(notes).glob("*.json")]
    return ExitCode.INCOMPLETE if any(note["unanswered"] for note in left) else ExitCode.PASS


def _deployment(serve: Any, settings: Settings, replicas: int) -> Any:  # noqa: ANN401 - no types
    made = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        # Admission is the replica's own: nothing may wait where no deadline is looked at.
        max_ongoing_requests=settings.max_queue + settings.max_connections,
        ray_actor_options={"num_cpus": 0.5},
        graceful_shutdown_timeout_s=settings.drain_s + _GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        user_config={"draining": False},
    )(serve.ingress()(Replica))
    # Without a version each deployment is a new one to Ray, and instead of telling the replicas
    # that they drain it would end them and start others, to be ended in turn.
    return made.options(version=_VERSION, _internal=True)


@contextlib.contextmanager
def _cluster(replicas: int, host: str, port: int, stops: Sequence[signal.Signals]) -> Iterator[Any]:
    """Starts Ray on this machine with its proxy, and ends it.

    Raises:
        KeyboardInterrupt: One of `stops` came while it started; it is ended again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray, serve = import_module("ray"), import_module("ray.serve")
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray Serve, and {error.name!r} is not installed; "
            "`pip install 'bitnet-forge-harness[ray]'`."
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # A closed terminal hangs up on all that runs in it; what Ray starts is needed for the drain.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _on_signals((s for s in stops if s is not signal.SIGHUP), _interrupt)
    try:
        try:
            ray.init(
                num_cpus=max(2, replicas),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except BaseException as error:
            # Ray does not know yet what it has started, which would linger for a minute.
            _kill_children()
            if isinstance(error, SystemExit):  # What Ray's own handler of SIGTERM raises.
                raise KeyboardInterrupt from None
            raise
        _on_signals(stops, _interrupt)
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        yield serve
        serve.shutdown()
    finally:
        ray.shutdown()


def _kill_children() -> None:
    """Ends every process below this one; nothing else was started here."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _interrupt() -> None:
    raise KeyboardInterrupt


def _on_signals(stops: Iterable[signal.Signals], call: Callable[[], None]) -> None:
    """Calls on signals. Once more when Ray has started: it sets handlers of its own."""
    for number in stops:
        signal.signal(number, lambda *_: call())


def _free_port(host: str, port: int) -> int:
    """Returns the port, or one that is free for 0, which Ray does not take.

    Another program may still take it before Ray does.

    Raises:
        UsageError: It is taken, or cannot be listened on.
    """
    with listen(host, port) as listening:
        return int(listening.getsockname()[1])
