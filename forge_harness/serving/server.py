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
from starlette.types import Scope

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
_BACKLOG = 2048
_SWITCH_S = 0.001
"""Between threads of Python: a busy loop must not hold the inference thread for 5 ms at each of its
operations."""

_log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose signals are ours (it would raise them again after a drain), and handshakes.

    A connection counts as one only after its handshake, for which uvicorn allows a minute.
    """

    handshake_s: float | None = None

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
        self._is_in_hurry = False

    @property
    def url(self) -> str:
        """Its address, once it listens."""
        return self.core.url

    async def run(self, on_ready: Callable[[Server], None] = lambda server: None) -> ExitCode:
        """Serves until SIGTERM, SIGINT or a drain is asked for.

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
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number.name)
        serving = loop.create_task(http.serve(sockets=[listening]))
        unanswered: int | None = None
        try:
            await self.core.engine.start()
            await self._until(lambda: self.health.is_ready or self._drain_asked.is_set(), serving)
            if self.health.is_ready:
                on_ready(self)
            await self._until(self._drain_asked.is_set, serving)
            unanswered = await self._drain()
        finally:
            http.should_exit = True
            await serving
            await self.core.engine.stop()
            if unanswered is not None:
                # Last: requests that are not admitted, as the one that asked for the drain, are
                # recorded until the connections are closed.
                self.core.record("serve.stop", {"unanswered": unanswered})
            self.guard.close()
        return ExitCode.INCOMPLETE if unanswered else ExitCode.PASS

    def ask_to_drain(self, actor: str, why: str = "asked for") -> None:
        """Begins a drain, once recorded: not ready, nothing new, accepted requests finish.

        Raises:
            AuditError: It cannot be recorded.
        """
        if self._drain_asked.is_set():
            return
        self.guard.control("serve.drain", self.url, {"why": why}, actor)
        self.health.become(State.DRAINING, why)
        self._drain_asked.set()

    def _on_signal(self, name: str) -> None:
        if self._drain_asked.is_set():
            self._is_in_hurry = True
            return
        try:
            self.ask_to_drain(_OPERATOR, name)
        except AuditError as error:
            # A server that could not be stopped for want of a record would be worse.
            _log.error("The drain could not be recorded: %s", error)
            self.health.become(State.DRAINING, name)
            self._drain_asked.set()

    async def _drain(self) -> int:
        """Waits for what was accepted; returns how many requests it had to abandon."""
        until = time.monotonic() + self.settings.drain_s
        while self.core.admission.in_flight and time.monotonic() < until and not self._is_in_hurry:
            await asyncio.sleep(_POLL_S)
        return self.core.abandon_all()

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
        listening = _listen(settings.host, settings.port)
        host, port = listening.getsockname()[:2]
        scheme = "http" if context is None else "https"
        self.core.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        app = self.core.application()

        def door(scope: Scope) -> Refusal | None:
            return app.refuse(scope) if self.core.admission.is_overloaded else None

        config = uvicorn.Config(
            app,
            http=limited_protocol(settings, self.core.metrics, door),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(settings.keep_alive_s),
            timeout_graceful_shutdown=2,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
        http = _Uvicorn(config)
        http.handshake_s = None if context is None else settings.header_s
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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"Cannot listen on {host}:{port} ({error}); give another --host or --port."
        ) from error
