"""Sends one worker's share of a schedule on time, and writes down what came of each request."""

from __future__ import annotations

import contextlib
import errno
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.pool
import gevent.socket
import gevent.ssl
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

from forge_harness.load.plan import LoadPlan, bearer_token
from forge_harness.load.records import LACKING, Fate, Record
from forge_harness.load.schedule import arrivals, choices, phase_of, share
from forge_harness.load.traffic import Request, judge, requests_of

_BLOCK = 1 << 16
_OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
"""What this machine says that lets it open no more connections, whatever the server does."""
_MOST_BYTES = 16 << 20
"""Of an answer. One without an end would take all memory before its deadline."""
_FLUSH_S = 0.5
_DRAIN_GRACE_S = 1.0
_POOL_MARGIN = 1 << 14
"""Sockets cut off by a timeout while sending do not give their place in the pool back."""

Told = Callable[[Request, Record], None]


class OpenLoop:
    """One worker's share of a plan.

    Args:
        plan: What is sent.
        directory: Where records go.
        worker: Index of this worker.
        of: Workers in all.
        told: Called with each request that was sent and has ended.
    """

    def __init__(
        self, plan: LoadPlan, directory: Path, *, worker: int, of: int, told: Told
    ) -> None:
        self.plan = plan
        self._requests = requests_of(plan, directory)
        due = arrivals(plan.phases, plan.seed)
        kinds = choices(len(due), len(self._requests), plan.seed)
        self.records = [
            Record(i, due[i], kinds[i], request_id=f"{plan.seed:x}-{i}")
            for i in share(len(due), worker=worker, of=of)
        ]
        self._told = told
        self._heads = [_head(request, plan) for request in self._requests]
        self._pool = _connections(plan)
        self._greenlets = gevent.pool.Pool(plan.concurrency)
        self._start = 0.0
        self._directory = directory
        self._worker = worker
        self._unwritten: list[Record] = []
        self._closed = False
        self.position = 0
        self.cpu: list[tuple[float, float]] = []
        """(time, processor seconds of this process) twice a second."""

    def now(self) -> float:
        """Returns the time since the start, in seconds; negative before it."""
        return time.monotonic() - self._start

    @property
    def phase(self) -> str:
        """Name of the running phase."""
        return self.plan.phases[phase_of(max(self.now(), 0.0), self.plan.phases)].name

    def run(self, start: float) -> None:
        """Sends everything, waits for what is in flight, and writes the records.

        Args:
            start: Monotonic time of the start.
        """
        self._start = start
        path = self._directory / f"records-{self._worker}.jsonl"
        with path.open("w", encoding="utf-8", buffering=_BLOCK) as stream:

            def write() -> None:
                batch, self._unwritten = self._unwritten, []
                stream.writelines(f"{record.line()}\n" for record in batch)
                stream.flush()

            writer = gevent.spawn(self._write_regularly, write)
            try:
                self._send_all()
                self._greenlets.join(timeout=self.plan.timeout_s + _DRAIN_GRACE_S)
            finally:
                writer.kill()
                self._close()
                write()

    def _send_all(self) -> None:
        for record in self.records:
            # Even a late one lets the others run first, or answers would never be read.
            gevent.sleep(max(record.intended - self.now(), 0.0))
            self.position += 1
            if self._greenlets.full():
                record.fate = Fate.DROPPED
                record.detail = f"{self.plan.concurrency} in flight"
                self._unwritten.append(record)
            else:
                self._greenlets.spawn(self._exchange, record)

    def _write_regularly(self, write: Callable[[], None]) -> None:
        while True:
            self.cpu.append((self.now(), time.process_time()))
            write()
            gevent.sleep(_FLUSH_S)

    def _close(self) -> None:
        """Ends what is still in flight: its records stay censored."""
        self.cpu.append((self.now(), time.process_time()))
        self._closed = True
        self._greenlets.kill(block=True, timeout=_DRAIN_GRACE_S)
        written = {r.index for r in self._unwritten}
        self._unwritten += [
            r for r in self.records if r.fate is Fate.CENSORED and r.index not in written
        ]
        self._pool.close()

    def _exchange(self, record: Record) -> None:
        request = self._requests[record.kind]
        record.sent = self.now()
        deadline = gevent.Timeout(self.plan.timeout_s)
        deadline.start()
        response = None
        try:
            response = self._send(record, request)
            first = response.read(1)
            record.first = self.now()
            body = first + response.read()
            record.done = self.now()
            if not response.message_complete:
                raise HTTPParseError("connection closed before the end of the answer")
            record.status = response.status_code
            record.size = len(body)
            headers = {name.lower(): value for name, value in response.items()}
            verdict = judge(
                request,
                status=record.status,
                headers=headers,
                body=body,
                sent_id=record.request_id,
            )
            record.fate, record.detail = verdict.fate, verdict.detail
            record.status = verdict.status or record.status
        except gevent.Timeout as expired:
            if expired is not deadline:
                raise
            record.done, record.status = self.now(), None
            record.fate, record.detail = Fate.TIMEOUT, "no answer before the deadline"
        except (HTTPParseError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _OWN_LIMITS:
                record.sent, record.fate = None, Fate.DROPPED
                record.detail = f"{LACKING} ({error.strerror})"
            else:
                record.done, record.status = self.now(), None
                record.fate, record.detail = Fate.ERROR, f"{type(error).__name__}: {error}"[:200]
        finally:
            deadline.close()
            if response is not None:
                response.release()
        if not self._closed:
            self._unwritten.append(record)
            if record.sent is not None:
                self._told(request, record)

    def _send(self, record: Record, request: Request) -> HTTPSocketPoolResponse:
        """Sends once. A client that sends again by itself would break the count on both sides."""
        message = b"%sX-Request-Id: %s\r\n\r\n%s" % (
            self._heads[record.kind],
            record.request_id.encode(),
            request.body,
        )
        connection = self._pool.get_socket()
        try:
            connection.sendall(message)
        except BaseException:
            self._pool.release_socket(connection)
            raise
        return _Response(connection, self._pool, block_size=_BLOCK, method=request.method)


class _Response(HTTPSocketPoolResponse):
    """An answer of a bounded size, before which others (1xx) may announce it.

    The library gives the connection back at the end of those too, and the next request reads what
    was announced.
    """

    _bytes = 0

    def feed(self, data: str | bytes) -> None:
        """Parses what was read."""
        self._bytes += len(data)
        if self._bytes > _MOST_BYTES:
            raise HTTPParseError(f"the answer is larger than {_MOST_BYTES >> 20} MiB")
        super().feed(data)

    def _on_message_complete(self) -> None:
        if self.get_code() < 200:
            self.message_complete = True
        else:
            super()._on_message_complete()


def _head(request: Request, plan: LoadPlan) -> bytes:
    lines = [
        f"{request.method} {urlsplit(plan.url).path.rstrip('/')}{request.path} HTTP/1.1",
        f"Host: {urlsplit(plan.url).netloc}",
        "User-Agent: forge-harness-load",
        "Accept: text/event-stream" if request.streamed else "Accept: application/json",
        f"X-Deadline-Ms: {max(1, round(1000 * plan.timeout_s))}",
    ]
    if request.body or request.method in ("POST", "PUT", "PATCH"):
        lines += ["Content-Type: application/json", f"Content-Length: {len(request.body)}"]
    if token := bearer_token(plan):
        lines.append(f"Authorization: Bearer {token}")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1")


def _address(host: str, port: int, patience_s: float) -> str:
    """Returns the first address of a name at which something listens; of none, the first.

    Looked up once: a lookup for each connection would be part of the server's time. localhost is
    ::1 before it is 127.0.0.1 on many machines, whatever the server listens on.
    """
    found = gevent.socket.getaddrinfo(host, port, type=gevent.socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found if len(found) > 1 else ():
        with contextlib.suppress(OSError), gevent.socket.socket(family, kind, protocol) as tried:
            tried.settimeout(patience_s)
            tried.connect(address)
            return str(address[0])
    return str(found[0][4][0])


def _connections(plan: LoadPlan) -> ConnectionPool:
    parts = urlsplit(plan.url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = _address(host, port, plan.timeout_s)
    common: dict[str, Any] = {
        "size": plan.concurrency + _POOL_MARGIN,
        "connection_timeout": plan.timeout_s,
        "network_timeout": plan.timeout_s,
    }
    if not secure:
        return ConnectionPool(address, port, host, port, **common)

    def context(cafile: str | None = None) -> ssl.SSLContext:
        made: ssl.SSLContext = gevent.ssl.create_default_context(cafile=plan.ca)
        return made

    return SSLConnectionPool(address, port, host, port, ssl_context_factory=context, **common)
