"""The server process: listens, becomes ready, serves until told to stop, drains, ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import Receive, Scope, Send

from forge_harness.errors import AuditError, ExitCode, UsageError

from .connection import limited_protocol
from .core import Core
from .engine import Scheduler
from .exchange import Refusal
from .guard import Guard
from .health import State
from .package import Served
from .settings import Settings
from .tls import server_context

_POLL_S = 0.02
_GRACE_S = 2.0
"""After a drain: for the refusals of what it abandoned, and what was never admitted, to be sent."""
_BACKLOG = 2048
_SWITCH_S = 0.001
"""Between threads of Python: a busy loop must not hold the inference thread for 5 ms at each of its
operations."""

_log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """uvicorn, but for its signals, handshakes and end.

    It would raise signals again after a drain; allow a handshake, before which a connection does
    not count as one, a minute; and answer what it cancels at its end with a text.
    """

    handshake_s: float | None = None
    has_time: Callable[[], bool]
    """Whether what is still being answered, recorded or sent is waited for."""
    cut_off: Callable[[int], None]
    """Told how many requests are not answered when there is no more time."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on the sockets given."""
        config, loop = self.config, asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            kind = cast("Callable[..., asyncio.Protocol]", config.http_protocol_class)
            return kind(config=config, server_state=self.server_state, app_state={})

        self.servers = [
            await loop.create_server(
                connection, sock=each, ssl=config.ssl, ssl_handshake_timeout=self.handshake_s
            )
            for each in sockets or ()
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, and closes each connection once it has its answer."""
        state = self.server_state
        for server in self.servers:
            server.close()
        for each in sockets or ():
            each.close()
        for connection in list(state.connections):
            connection.shutdown()
        while (state.tasks or state.connections) and self.has_time():
            await asyncio.sleep(_POLL_S)
        late = list(state.tasks)
        self.cut_off(len(late))
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(_POLL_S)  # Until each request knows that it has no client any more.
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A server of one model.

    Args:
        served: The model.
        settings: Limits and places.
        guard: Tokens, roles, audit.
        build: Makes the scheduler of the inference thread; None: the one of the model.
    """

    def __init__(
        self,
        served: Served,
        settings: Settings,
        guard: Guard,
        *,
        build: Callable[[], Scheduler] | None = None,
    ) -> None:
        self.settings, self.guard = settings, guard
        self.core = Core(served, settings, guard, drain=self.ask_to_drain, build=build)
        self.health = self.core.health
        self._drain_asked = asyncio.Event()
        self._drained_by = 0.0
        self._unanswered = 0

    @property
    def url(self) -> str:
        """Its address, once it listens."""
        return self.core.url

    async def run(self, on_ready: Callable[[Server], None] = lambda server: None) -> ExitCode:
        """Serves until SIGTERM, SIGINT, SIGHUP or a drain is asked for.

        Args:
            on_ready: Called when the canary has been answered and requests are admitted.

        Returns:
            PASS, or INCOMPLETE when accepted requests were still unanswered at the end of a drain.

        Raises:
            UsageError: The address or the certificate cannot be used.
            AuditError: The start cannot be recorded.
        """
        sys.setswitchinterval(_SWITCH_S)
        loop = asyncio.get_running_loop()
        http, listening = self._http()
        self.guard.control("serve.start", self.url, {"model": self.core.served.name}, _OPERATOR)
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_signal, number)
        serving = loop.create_task(http.serve(sockets=[listening]))
        is_drained = False
        try:
            await self.core.engine.start()
            await self._until(lambda: self.health.is_ready or self._drain_asked.is_set(), serving)
            if self.health.is_ready:
                on_ready(self)
            await self._until(self._drain_asked.is_set, serving)
            await self._drain()
            is_drained = True
        finally:
            http.should_exit = True
            await serving
            await self.core.engine.stop()
            if is_drained:
                # Last: requests that are not admitted, as the one that asked for the drain, are
                # recorded until the connections are closed, and those cut off even after that.
                self.core.record("serve.stop", {"unanswered": self._unanswered}, is_last=True)
            self.guard.close()
        return ExitCode.INCOMPLETE if self._unanswered else ExitCode.PASS

    def ask_to_drain(self, actor: str, why: str = "asked for") -> None:
        """Begins a drain, once recorded: not ready, nothing new, accepted requests finish.

        Raises:
            AuditError: It cannot be recorded.
        """
        if self._drain_asked.is_set():
            return
        self.guard.control("serve.drain", self.url, {"why": why}, actor)
        self._begin_drain(why)

    def _begin_drain(self, why: str) -> None:
        self._drained_by = time.monotonic() + self.settings.drain_s
        self.health.become(State.DRAINING, why)
        self._drain_asked.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._drain_asked.is_set():
            # A closed terminal hangs up more than once: the kernel does, and the shell.
            if number is not signal.SIGHUP:
                self._drained_by = min(self._drained_by, time.monotonic())
            return
        try:
            self.ask_to_drain(_OPERATOR, number.name)
        except AuditError as error:
            # A server that could not be stopped for want of a record would be worse.
            _log.error("The drain could not be recorded: %s", error)
            self._begin_drain(number.name)

    async def _drain(self) -> None:
        """Waits until what was accepted is answered, and abandons what then is not."""
        while self.core.admission.in_flight and time.monotonic() < self._drained_by:
            await asyncio.sleep(_POLL_S)
        self._unanswered = self.core.abandon_all()

    def _cut_off(self, requests: int) -> None:
        # What was admitted is counted already, by `_drain` when it had to abandon it.
        self._unanswered += requests - self.core.admission.in_flight

    async def _until(self, condition: Callable[[], bool], serving: asyncio.Task[None]) -> None:
        while not condition():
            if serving.done():
                serving.result()
                raise UsageError(f"The server on {self.url} ended by itself; see its log.")
            await asyncio.sleep(_POLL_S)

    def _http(self) -> tuple[_Uvicorn, socket.socket]:
        settings = self.settings
        context = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            context = server_context(settings.tls_cert, settings.tls_key)
        listening = listen(settings.host, settings.port)
        host, port = listening.getsockname()[:2]
        scheme = "http" if context is None else "https"
        self.core.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        app = self.core.application()

        def door(scope: Scope) -> Refusal | None:
            return app.refuse(scope) if self.core.admission.is_overloaded else None

        async def quietly(scope: Scope, receive: Receive, send: Send) -> None:
            # Cancelled is what has lost its client at the end of a drain; that is no error.
            with contextlib.suppress(asyncio.CancelledError):
                await app(scope, receive, send)

        config = uvicorn.Config(
            quietly,
            http=limited_protocol(settings, self.core.metrics, door),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
        http = _Uvicorn(config)
        http.handshake_s = None if context is None else settings.header_s
        http.has_time = lambda: time.monotonic() < self._drained_by + _GRACE_S
        http.cut_off = self._cut_off
        return http, listening


_OPERATOR = "operator"


def serve(
    served: Served,
    settings: Settings,
    guard: Guard,
    *,
    on_ready: Callable[[Server], None] = lambda server: None,
    build: Callable[[], Scheduler] | None = None,
) -> ExitCode:
    """Runs a server in this process; see `Server.run`."""

    async def run() -> ExitCode:
        return await Server(served, settings, guard, build=build).run(on_ready)

    import uvloop

    return uvloop.run(run())


def ready_line(server: Server) -> dict[str, object]:
    """Returns what the command line prints when the server is ready."""
    return {"ready": True, "url": server.url, "pid": os.getpid(), "model": server.core.served.name}


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that drain; a hang-up does not under nohup, which has it ignored."""
    stops = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    return stops


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
        UsageError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"Cannot listen on {host}:{port} ({error}); give another --host or --port."
        ) from error
