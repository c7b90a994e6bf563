"""What is sent, and whether what came back is right.

A request file holds a JSON object a line:

    {"path": "/v1/predict", "body": {"inputs": [[...]]}, "expect": {"labels": [3]}}

`method` is POST unless given. `expect` may hold `labels`, `tokens` (ids of the first choice),
`text_sha256` (of its text), and `json` (a part the answer must contain). Without `expect` only
form is checked: that the answer is whole and carries the id of the request it answers. That to HEAD
has no body. /metrics is no request: reading the server's counters is counted too.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from forge_harness.canonical import read_strict, sha256_hex
from forge_harness.errors import LoadError

from .plan import PLAN, LoadPlan, read_file
from .records import Fate

_FIELDS = frozenset({"path", "body", "method", "expect"})
_EXPECTED = frozenset({"labels", "tokens", "text_sha256", "json"})
_INPUTS = 64
"""Features of a digit, the input of the reference classifier."""
_METHOD = re.compile(r"[A-Z][A-Z-]*")
_COUNTERS = "/metrics"
_OTHER_FORM = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What taking an answer apart raises when it is JSON and none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One kind of request, ready to be sent many times."""

    path: str
    body: bytes = b""
    method: str = "POST"
    streamed: bool = False
    expect: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer was."""

    fate: Fate
    detail: str = ""
    status: int | None = None
    """What a stream says at its end that it came to; None: nothing else than it began with."""


def read_requests(path: Path, *, sha256: str | None = None) -> tuple[Request, ...]:
    """Reads a request file.

    Args:
        path: Of the file.
        sha256: Hexadecimal digest it must have; None when any will do.

    Raises:
        LoadError: It is missing, empty or another, or a line is no request, with its number.
    """
    content = read_file(path)
    if sha256 is not None and sha256_hex(content) != sha256:
        raise LoadError(
            f"{path} is not what was sent: its SHA-256 is not that of {path.parent / PLAN}; put "
            "the copy back that the run made, or run the load again."
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise LoadError(f"The request file {path} cannot be read: {error}.") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise LoadError(f"The request file {path} holds no request; expected a JSON object a line.")
    return tuple(_request(line, f"{path}, line {n}") for n, line in lines)


def _request(line: str, where: str) -> Request:
    try:
        content = read_strict(line)
        body = content.get("body") if isinstance(content, dict) else None
        sent = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    except ValueError as error:
        raise LoadError(f"{where} is no JSON: {error}.") from error
    except RecursionError as error:
        raise LoadError(f"{where} nests too deep; send fewer levels.") from error
    if not isinstance(content, dict) or not _is_path(content.get("path")):
        raise LoadError(f'{where} is no request; expected {{"path": "/...", "body": {{...}}}}.')
    if route_of(content["path"]) == _COUNTERS:
        raise LoadError(
            f"{where}: {_COUNTERS} is read by the load itself, and would be counted twice; send "
            "other requests."
        )
    expect = content.get("expect", {})
    if not isinstance(expect, dict):
        raise LoadError(f"{where}: expect is no object; expected some of {sorted(_EXPECTED)}.")
    strange = (set(content) - _FIELDS) | (set(expect) - _EXPECTED)
    if strange:
        raise LoadError(
            f"{where}: unknown {sorted(strange)}; expected {sorted(_FIELDS)}, and in "
            f"expect {sorted(_EXPECTED)}."
        )
    return Request(
        path=content["path"],
        body=sent,
        method=_method(content.get("method", "POST"), where),
        streamed=isinstance(body, dict) and body.get("stream") is True,
        expect=expect,
    )


def _method(value: Any, where: str) -> str:  # noqa: ANN401 - any JSON value
    method = value.upper() if isinstance(value, str) else ""
    if not _METHOD.fullmatch(method):
        raise LoadError(f"{where}: method {str(value)[:40]!r} is none; expected GET, POST, ...")
    return method


def route_of(path: str) -> str:
    """Returns what a server finds the route of a request by: no query, no percent-encoding."""
    return unquote(re.split("[?#]", path, maxsplit=1)[0])


def _is_path(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    """Whether it can stand in a request line; a line break in it would start a header."""
    return (
        isinstance(value, str)
        and value.startswith("/")
        and value.isascii()
        and (value.isprintable() and " " not in value)
    )


def seeded_digits(seed: int, count: int = 64) -> tuple[Request, ...]:
    """Returns classifier requests of random 8x8 digits (0..16 in each feature), without labels."""
    rng = random.Random(f"{seed}/digits")
    return tuple(
        Request(
            path="/v1/predict",
            body=json.dumps(
                {"inputs": [[float(rng.randint(0, 16)) for _ in range(_INPUTS)]]}
            ).encode(),
        )
        for _ in range(count)
    )


def requests_of(plan: LoadPlan, directory: Path) -> tuple[Request, ...]:
    """Returns the requests that the plan in a directory sends: its copy of a file, or digits.

    Raises:
        LoadError: The copy is missing or another, or the plan does not tell which it was.
    """
    if plan.requests is None:
        return seeded_digits(plan.seed)
    if plan.requests_sha256 is None:
        raise LoadError(
            f"{directory / PLAN} is of an earlier release and names its requests without a digest, "
            "so what was sent is not known; run the load again."
        )
    return read_requests(directory / plan.requests, sha256=plan.requests_sha256)


def judge(
    request: Request, *, status: int, headers: Mapping[str, str], body: bytes, sent_id: str
) -> Verdict:
    """Returns how a request ended, from its whole answer.

    Args:
        request: What was sent.
        status: HTTP status.
        headers: Of the answer, names in lower case.
        body: Of the answer.
        sent_id: X-Request-Id that was sent. An answer with another one belongs to somebody else.
    """
    if status in (429, 503):
        if "retry-after" in headers:
            return Verdict(Fate.SHED, f"status {status}")
        return Verdict(Fate.ERROR, f"status {status} without Retry-After")
    if status == 504:
        return Verdict(Fate.TIMEOUT, "status 504")
    if not 200 <= status < 300:
        return Verdict(Fate.ERROR, f"status {status}")
    echoed = headers.get("x-request-id", sent_id)
    if echoed != sent_id:
        return Verdict(Fate.ERROR, "answer to another request (X-Request-Id)")
    try:
        problem = _problem(request, body, sent_id)
    except Failed as failed:
        fate = Fate.TIMEOUT if failed.status == 504 else Fate.ERROR
        return Verdict(fate, f"stream ended with {failed}", failed.status)
    except _OTHER_FORM:
        problem = "answer has another form"
    return Verdict(Fate.ERROR, problem) if problem else Verdict(Fate.OK)


def _problem(request: Request, body: bytes, sent_id: str) -> str:
    """Returns what is wrong with the body of an answer, "" for nothing; raises _OTHER_FORM."""
    if request.method == "HEAD" and not body:
        return _mismatch(request.expect, None, sent_id)
    try:
        answer = _stream(body) if request.streamed else read_strict(body.decode())
    except Truncated as error:
        return f"truncated stream: {error}"
    except ValueError:
        return "answer is no JSON"
    return _mismatch(request.expect, answer, sent_id)


class Truncated(ValueError):
    """A stream that ended before its end."""


class Failed(Exception):
    """A stream that says at its end that it failed.

    Args:
        status: Under which the server counts it; None when it does not say.
    """

    def __init__(self, status: int | None) -> None:
        super().__init__("an error" if status is None else f"status {status}")
        self.status = status


def _stream(body: bytes) -> dict[str, Any]:
    """Puts a stream of server-sent events together into the answer it would have been.

    Raises:
        Failed: The terminal event is an error.
        Truncated: The terminal event, its usage or `[DONE]` is missing, or tokens are.
        ValueError: An event is no JSON.
    """
    if not body.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
        raise Truncated("it stops in the middle of an event")
    # The three line ends of the standard, and no other: a text may hold those.
    lines = re.split("\r\n|\n|\r", body.decode("utf-8"))
    events = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    if not events or events[-1] != "[DONE]":
        raise Truncated("no [DONE]")
    parts = [read_strict(event) for event in events[:-1]]
    if parts and isinstance(parts[-1], dict) and isinstance(error := parts[-1].get("error"), dict):
        status = error.get("status")
        raise Failed(status if type(status) is int and 400 <= status < 600 else None)
    if not parts or "finish_reason" not in parts[-1] or "usage" not in parts[-1]:
        raise Truncated("no terminal event with finish_reason and usage")
    tokens = [part["token"] for part in parts[:-1] if "token" in part]
    promised = parts[-1]["usage"].get("completion_tokens", len(tokens))
    if promised != len(tokens):
        raise Truncated(f"{len(tokens)} of {promised} tokens")
    # The terminal event has no token, and the text of one that was cut off.
    text = "".join(part.get("text", "") for part in parts)
    return {**parts[-1], "choices": [{"text": text, "tokens": tokens}]}


def _mismatch(expect: Mapping[str, Any], answer: Any, sent_id: str) -> str:  # noqa: ANN401
    if not isinstance(answer, dict):
        return "" if not expect else "answer is no JSON object"
    if answer.get("request_id", sent_id) != sent_id:
        return "answer to another request (request_id)"
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    found = {
        "labels": answer.get("labels"),
        "tokens": choice.get("tokens"),
        "text_sha256": hashlib.sha256(str(choice.get("text", "")).encode()).hexdigest(),
    }
    for name, value in expect.items():
        if name == "json":
            if not _contains(answer, value):
                return "wrong answer (json)"
        elif not _same(found[name], value):
            return f"wrong answer ({name})"
    return ""


def _contains(answer: Any, part: Any) -> bool:  # noqa: ANN401 - JSON values
    if isinstance(part, dict):
        return isinstance(answer, dict) and all(
            key in answer and _contains(answer[key], value) for key, value in part.items()
        )
    return _same(answer, part)


def _same(found: Any, wanted: Any) -> bool:  # noqa: ANN401 - JSON values
    """Whether two JSON values are equal; true is 1 to Python only."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[k], wanted[k]) for k in wanted)
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)
