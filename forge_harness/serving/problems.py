"""What a server answers when it does not do what was asked: RFC 9457 problem documents."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MEDIA_TYPE = "application/problem+json"
_LONGEST_RETRY_S = 86_400
"""No client waits longer, and at a rate of nearly nothing the time is beyond any number."""


class Outcome(StrEnum):
    """How a request ended; each ends in one way only, so the counts add up."""

    OK = "ok"
    SHED = "shed"
    CLIENT_ERROR = "client_error"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of problems.

    Attributes:
        name: End of the type's URN.
        status: Of HTTP.
        title: What it is, always the same.
        outcome: How the request is counted.
    """

    name: str
    status: int
    title: str
    outcome: Outcome = Outcome.CLIENT_ERROR


MALFORMED = Kind("malformed", 400, "The request is malformed")
UNAUTHENTICATED = Kind("unauthenticated", 401, "No valid token")
FORBIDDEN = Kind("forbidden", 403, "The role does not have the permission")
FOREIGN_PAGE = Kind("foreign-page", 403, "A page of another site may not ask")
NOT_FOUND = Kind("not-found", 404, "There is no such resource")
WRONG_METHOD = Kind("wrong-method", 405, "The resource has no such method")
SLOW_BODY = Kind("slow-body", 408, "The request body took too long")
TOO_LARGE = Kind("too-large", 413, "The request body is too large")
WRONG_MEDIA_TYPE = Kind("wrong-media-type", 415, "The request body is not JSON")
UNPROCESSABLE = Kind("unprocessable", 422, "The request cannot be processed as given")
QUOTA = Kind("quota", 429, "The client asks for more than its share", Outcome.SHED)
CANCELLED = Kind("cancelled", 499, "The client left", Outcome.CANCELLED)
INTERNAL = Kind("internal", 500, "The server failed", Outcome.FAILED)
OVERLOADED = Kind("overloaded", 503, "The server is overloaded", Outcome.SHED)
NOT_READY = Kind("not-ready", 503, "The server is not ready", Outcome.SHED)
INFERENCE_FAILED = Kind("inference-failed", 503, "The inference ended early", Outcome.FAILED)
NO_TOKENS = Kind("no-tokens", 503, "Tokens cannot be checked", Outcome.FAILED)
NOT_AUDITED = Kind("not-audited", 503, "The request could not be recorded", Outcome.FAILED)
DEADLINE = Kind("deadline", 504, "The deadline passed", Outcome.DEADLINE)

KINDS = tuple(value for value in list(globals().values()) if isinstance(value, Kind))


class Problem(Exception):
    """Ends a request with a problem document.

    Args:
        kind: Its class.
        detail: One sentence: the value, what was expected, the remedy.
        retry_after_s: Seconds after which it makes sense to ask again.
        reason: Of shedding, for the metrics.
        headers: More response headers.
    """

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        retry_after_s: float | None = None,
        reason: str = "",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail
        self.retry_after_s, self.reason = retry_after_s, reason or kind.name
        self.headers = headers

    def document(self, request_id: str) -> dict[str, Any]:
        """Returns the members of the document."""
        return {
            "type": f"urn:forge-harness:problem:{self.kind.name}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "request_id": request_id,
        }

    def body(self, request_id: str) -> bytes:
        """Returns the document as JSON."""
        return json.dumps(self.document(request_id)).encode()

    def all_headers(self) -> list[tuple[str, str]]:
        """Returns the response headers the problem calls for."""
        headers = list(self.headers)
        if self.retry_after_s is not None:
            seconds = math.ceil(min(self.retry_after_s, _LONGEST_RETRY_S))
            headers.append(("retry-after", str(max(1, seconds))))
        if self.kind is UNAUTHENTICATED:
            headers.append(("www-authenticate", "Bearer"))
        return headers
