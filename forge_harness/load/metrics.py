"""What the server counted itself: its Prometheus metrics, read before and after a run."""

from __future__ import annotations

import http.client
import math
import re
import ssl
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forge_harness.errors import LoadError

REQUESTS = "forge_requests_total"
IN_FLIGHT = "forge_requests_in_flight"
MEMORY = "process_resident_memory_bytes"
STARTED = "process_start_time_seconds"
UNMATCHED = "unmatched"
"""Label of requests for what is no route."""
_NOT_OFFERED = (404, 405)
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a scrape."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def parse(text: str) -> tuple[Sample, ...]:
    """Reads the Prometheus text format; lines that are no sample are left out."""
    found = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match.group(3))
        except ValueError:
            continue
        labels = tuple(sorted(_LABEL.findall(match.group(2) or "")))
        found.append(Sample(match.group(1), labels, value))
    return tuple(found)


def total(samples: Iterable[Sample], name: str) -> float | None:
    """Returns the sum over all labels of a metric; None when it has none, or no finite one."""
    values = [sample.value for sample in samples if sample.name == name]
    found = sum(values)
    return found if values and math.isfinite(found) else None


class CountersRefusedError(LoadError):
    """The server is there, and its counters cannot be read.

    Args:
        status: What it answers instead.
    """

    def __init__(self, status: int) -> None:
        super().__init__(refusal(status).capitalize() + ".")
        self.status = status


class UnreachableError(LoadError):
    """Nothing answers at the address.

    Args:
        url: The address.
        reason: What was seen instead.
    """

    def __init__(self, url: str, reason: object) -> None:
        super().__init__(
            f"Nothing answers at {url} ({reason}); start a server with `forge-harness serve`, and "
            "give --ca for a certificate of your own."
        )
        self.reason = reason


def refusal(status: int) -> str:
    """Returns in a clause why there are no counters, and what to do."""
    remedy = "look at its log"
    if status in (401, 403):
        remedy = "use a token whose role has metrics:read, as engineer has"
    elif 300 <= status < 400:
        remedy = "give --url the address it leads to, which would get no load and no token"
    return f"the server's counters could not be read (/metrics answers {status}): {remedy}"


def is_restarted(earlier: Iterable[Sample], later: Iterable[Sample]) -> bool:
    """Whether two scrapes are of two processes: what they counted has nothing in common."""
    before, after = total(earlier, STARTED), total(later, STARTED)
    # Where the start is worked out at each scrape, from the time since boot, it may move by 1 s.
    return before is not None and after is not None and abs(after - before) > 1


def labels_of(samples: Iterable[Sample], routes: Iterable[str]) -> frozenset[str]:
    """Returns what the server counts requests under, those for none of its routes included."""
    known = {dict(sample.labels).get("route") for sample in samples if sample.name == REQUESTS}
    return frozenset(route if route in known else UNMATCHED for route in routes)


def answers_by_code(samples: Iterable[Sample], paths: frozenset[str]) -> Counter[int] | None:
    """Returns how many requests of some routes were answered with each status.

    None when the server has no such counter at all.
    """
    counted: Counter[int] = Counter()
    known = False
    for sample in samples:
        if sample.name != REQUESTS:
            continue
        known = True
        labels = dict(sample.labels)
        code = labels.get("code", "")
        if labels.get("route") in paths and code.isdecimal() and math.isfinite(sample.value):
            counted[int(code)] += round(sample.value)
    return counted if known else None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the answer it is: elsewhere the token would be given to others."""

    def redirect_request(self, *_: object) -> None:
        """Says that nothing is asked in its place."""


def direct(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """Returns what asks a server itself, as the generator does: no proxy, no redirects."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects, *handlers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server is asked, and how.

    Attributes:
        url: Base address.
        ca: File of certificates that sign the server's, or None for the system's.
        token: Bearer token, or "".
    """

    url: str
    ca: str | None = None
    token: str = ""

    def get(self, path: str) -> tuple[int, bytes]:
        """Returns status and body.

        Raises:
            UnreachableError: Nothing answers there.
        """
        request = urllib.request.Request(self.url.rstrip("/") + path)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        secure = self.url.startswith("https")
        context = ssl.create_default_context(cafile=self.ca) if secure else None
        opener = direct(urllib.request.HTTPSHandler(context=context))
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                return int(answer.status), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(self.url, getattr(error, "reason", error)) from error

    def check(self) -> None:
        """Returns when something answers, whatever it says.

        Raises:
            UnreachableError: Nothing does.
        """
        self.get("/metrics")

    def scrape(self, *, at_rest: bool = False, patience_s: float = 2.0) -> str | None:
        """Returns /metrics as text; None when the server has none.

        Args:
            at_rest: Wait until the server says that nothing is in flight.
            patience_s: How long to wait for that.

        Raises:
            UnreachableError: Nothing answers there.
            CountersRefusedError: The server has them and does not give them.
        """
        until = time.monotonic() + patience_s
        while True:
            status, body = self.get("/metrics")
            if status in _NOT_OFFERED:
                return None
            if status != 200:
                raise CountersRefusedError(status)
            text = body.decode("utf-8", "replace")
            busy = total(parse(text), IN_FLIGHT) or 0
            # The scrape itself may be counted as the one in flight.
            if not at_rest or busy <= 1 or time.monotonic() > until:
                return text
            time.sleep(0.05)


def unexplained(own: Mapping[int, int], server: Mapping[int, int], unanswered: int) -> int:
    """Returns how many requests the two counts cannot both be right about.

    Each answer we saw, the server counted under the same status. What it counted beyond that must
    be requests whose answer we did not see (timeouts, broken connections), and no more than those.

    Args:
        own: Status -> answers we read.
        server: Status -> requests it counted.
        unanswered: Requests we sent and read no status for.
    """
    uncounted = sum(max(count - server.get(code, 0), 0) for code, count in own.items())
    surplus = sum(max(count - own.get(code, 0), 0) for code, count in server.items())
    return uncounted + max(surplus - unanswered, 0)
