"""One request and its answer, on bare ASGI: limits of size and time, JSON, events."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from forge_harness.canonical import read_strict
from forge_harness.security.access import ANONYMOUS, Principal

from .problems import (
    CANCELLED,
    MALFORMED,
    MEDIA_TYPE,
    SLOW_BODY,
    TOO_LARGE,
    WRONG_MEDIA_TYPE,
    Outcome,
    Problem,
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PROCESS, _NUMBERS = secrets.token_hex(8), itertools.count(1)
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
"""Charsets that are UTF-8, or part of it."""
LONGEST_DEADLINE_MS = 999_999_999


class Events(Protocol):
    """The body of a stream."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields chunks as they come; all but the last."""
        ...

    def last(self, problem: Problem | None = None) -> bytes:
        """Returns the last chunk, and counts the request by it.

        Args:
            problem: What the stream ends with whatever it has come to; None: with what it has.
        """
        ...

    def close(self) -> None:
        """Releases what it holds; called once the answer has ended in whatever way."""
        ...


@dataclass(slots=True)
class Reply:
    """An answer.

    Attributes:
        status: Of HTTP.
        body: Its bytes; of a stream, nothing.
        media_type: Its content type.
        headers: More headers.
        events: Of a stream.
        outcome: How the request is counted.
        code: The status it is counted under; None: `status`. A stream's is known at its end.
        detail: For the audit log.
    """

    status: int = 200
    body: bytes = b""
    media_type: str = "application/json"
    headers: list[tuple[str, str]] = field(default_factory=list)
    events: Events | None = None
    outcome: Outcome = Outcome.OK
    code: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def head(self, request_id: str) -> list[tuple[bytes, bytes]]:
        """Returns the headers it has whatever becomes of the connection."""
        headers = [
            (b"content-type", self.media_type.encode()),
            (b"x-request-id", request_id.encode()),
            *((name.encode(), value.encode("latin-1", "replace")) for name, value in self.headers),
        ]
        if self.events is None:
            headers.append((b"content-length", str(len(self.body)).encode()))
        return headers

    @classmethod
    def of(cls, problem: Problem, request_id: str) -> Reply:
        """Returns the answer that a problem is."""
        return cls(
            status=problem.kind.status,
            body=problem.body(request_id),
            media_type=MEDIA_TYPE,
            headers=problem.all_headers(),
            outcome=problem.kind.outcome,
            detail={"problem": problem.kind.name},
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer as the connection writes it.

    Attributes:
        status: Of HTTP.
        head: Names and values of the headers.
        body: Its bytes.
    """

    status: int
    head: list[tuple[bytes, bytes]]
    body: bytes


class Exchange:
    """A request being answered.

    Args:
        scope: Of ASGI.
        receive: Of ASGI.
        send: Of ASGI.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.started = time.monotonic()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.header("x-request-id")
        is_usable = given is not None and _REQUEST_ID.fullmatch(given) is not None
        self.request_id = given if given and is_usable else new_request_id()
        self.principal: Principal = ANONYMOUS
        self.is_closing = False
        self._at_end: list[Callable[[], None]] = []

    def header(self, name: str) -> str | None:
        """Returns a request header."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @property
    def path(self) -> str:
        """The path as it came, percent-encoded: decoded it may hold what breaks a log."""
        raw: bytes | None = self.scope.get("raw_path")
        if raw is None:
            return quote(self.scope["path"])
        return raw.decode("ascii", "backslashreplace")

    @property
    def client(self) -> str:
        """Whose share is used: the token's holder, or the address."""
        if self.principal is not ANONYMOUS:
            return self.principal.name
        return self.address

    @property
    def address(self) -> str:
        """Address of the peer."""
        peer = self.scope.get("client")
        return str(peer[0]) if peer else "unknown"

    def deadline(self, longest_s: float) -> float:
        """Returns the deadline on the monotonic clock: the client's, within the server's.

        Raises:
            Problem: MALFORMED: the header is no number of milliseconds.
        """
        text = self.header("x-deadline-ms")
        if text is None:
            return self.started + longest_s
        if not text.isascii() or not text.isdigit() or not 0 < len(text) <= 9 or int(text) < 1:
            raise Problem(
                MALFORMED,
                f"X-Deadline-Ms is {text[:32]!r}; expected whole milliseconds from 1 to "
                f"{LONGEST_DEADLINE_MS}.",
            )
        return self.started + min(int(text) / 1000, longest_s)

    async def body(self, *, most: int, within_s: float) -> bytes:
        """Returns the request body.

        Args:
            most: Bytes.
            within_s: Seconds.

        Raises:
            Problem: TOO_LARGE, SLOW_BODY, CANCELLED or MALFORMED.
        """
        declared = self.header("content-length")
        if declared is not None and declared.isdigit() and int(declared) > most:
            self._refuse_size(most)
        try:
            async with asyncio.timeout(within_s):
                return await self._whole_body(most)
        except TimeoutError:
            self.is_closing = True
            raise Problem(
                SLOW_BODY, f"The body was not there within {within_s:g} s; send it faster."
            ) from None

    async def _whole_body(self, most: int) -> bytes:
        chunks, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Problem(CANCELLED, "The client left before its request was there.")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > most:
                self._refuse_size(most)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _refuse_size(self, most: int) -> None:
        # What is still being sent would be taken for the next request.
        self.is_closing = True
        raise Problem(TOO_LARGE, f"The body is larger than {most} bytes; send fewer rows.")

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls back when the answer has been sent, or will never be."""
        self._at_end.append(call)

    def end(self) -> None:
        """The answer has been sent, or will never be."""
        for call in self._at_end:
            call()

    def on_leave(self, call: Callable[[], None]) -> asyncio.Task[None]:
        """Calls back when the client leaves; cancel the task when the answer is known."""

        async def wait() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            call()

        return asyncio.get_running_loop().create_task(wait())

    def head(self, reply: Reply) -> list[tuple[bytes, bytes]]:
        """Returns the headers of an answer."""
        headers = reply.head(self.request_id)
        if self.is_closing:
            headers.append((b"connection", b"close"))
        return headers

    async def send(self, reply: Reply) -> None:
        """Sends an answer, of a stream its head."""
        await self._send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": self.head(reply),
            }
        )
        await self.send_body(reply.body, is_last=reply.events is None)

    async def send_body(self, chunk: bytes, *, is_last: bool) -> None:
        """Sends a piece of the body; nothing happens when the client has left."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not is_last})


Handler = Callable[[Exchange], Awaitable[Reply]]


def new_request_id() -> str:
    """Returns an id for a request that came without a usable one."""
    return f"{_PROCESS}{next(_NUMBERS):08x}"


def check_json_type(exchange: Exchange) -> None:
    """Refuses a body that its own headers call something else than plain JSON in UTF-8.

    Raises:
        Problem: WRONG_MEDIA_TYPE.
    """
    media_type, charset = _content_type(exchange.header("content-type"))
    if media_type != "application/json":
        raise Problem(
            WRONG_MEDIA_TYPE, f"The body is {media_type[:60]!r}; expected application/json."
        )
    if charset not in _UTF8:
        raise Problem(
            WRONG_MEDIA_TYPE,
            f"The charset of the body is {charset[:60]!r}; expected utf-8, or no charset.",
        )
    encoding = (exchange.header("content-encoding") or "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Problem(
            WRONG_MEDIA_TYPE,
            f"The body has the Content-Encoding {encoding[:60]!r}; expected none: send it "
            "uncompressed.",
            headers=(("accept-encoding", "identity"),),
        )


def _content_type(header: str | None) -> tuple[str, str]:
    """Returns media type and charset of a header, by default those of JSON."""
    if not header:
        return "application/json", "utf-8"
    media_type, *parameters = header.split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return media_type.strip().lower(), value.strip().strip('"').lower()
    return media_type.strip().lower(), "utf-8"


def json_body(raw: bytes) -> dict[str, Any]:
    """Reads a JSON object, strictly.

    Raises:
        Problem: MALFORMED: not UTF-8, not JSON, NaN or infinity, a key twice, or no object.
    """
    try:
        value = read_strict(raw.decode())
    except UnicodeDecodeError as error:
        raise Problem(MALFORMED, f"The body is not UTF-8 at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise Problem(
            MALFORMED, f"The body is not JSON at character {error.pos}: {error.msg}."
        ) from error
    except RecursionError as error:
        raise Problem(MALFORMED, "The body nests too deep; expected one object.") from error
    except ValueError as error:
        raise Problem(MALFORMED, f"The body is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise Problem(MALFORMED, f"The body is a {type(value).__name__}; expected a JSON object.")
    return value


def dump(value: dict[str, Any]) -> bytes:
    """Returns JSON as it is sent; refuses NaN and infinity."""
    return _ENCODER.encode(value).encode()


# Made once: json.dumps with arguments makes one every time.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
