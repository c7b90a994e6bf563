"""What a load run does, as a file that every process of the generator reads."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forge_harness.canonical import digest_of, sha256_hex
from forge_harness.durable import write_durably
from forge_harness.errors import LoadError

from .schedule import Phase

SCHEMA = "forge-load-plan/1"
PLAN = "plan.json"
REQUESTS = "requests.jsonl"
"""Copy of the request file beside the plan: what was sent, whatever becomes of the original."""
SIGN = "FORGE-LOAD "
"""Starts the lines in which the generator tells its parent how far it is."""
MAX_ARRIVALS = 2_000_000
"""As many records are read into memory (about 1 GB)."""

Shape = tuple[tuple[float, float], ...]
"""(multiple of the base rate, seconds) of each phase."""

SHAPES: dict[str, Shape] = {
    "quick": ((1, 10), (5, 5), (10, 5), (23, 4), (50, 4), (1, 8)),
    "full": ((1, 30), (5, 20), (10, 20), (23, 15), (50, 10), (1, 30)),
    "nightly": ((1, 120), (5, 60), (10, 60), (23, 30), (50, 30), (1, 120)),
}
"""Profile -> phases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Phases, where they go, and what is expected of the answers."""

    url: str
    seed: int
    phases: tuple[Phase, ...]
    requests: str | None = None
    """File of requests (see traffic.py); None for seeded digits without labels. In a plan that was
    written, the name of the copy beside it."""
    requests_sha256: str | None = None
    """Of that copy; None in a plan that was not written yet."""
    timeout_s: float = 5.0
    """From sending to the whole answer; also sent as X-Deadline-Ms."""
    slo_s: float = 0.5
    """Response time that p95 (p99 under overload) must keep."""
    concurrency: int = 1024
    """Requests in flight at which the generator drops the next one, and says so."""
    token_env: str | None = None
    """Name of the environment variable with the bearer token; the token is never written."""
    ca: str | None = None
    """Certificates that sign the server's, absolute."""
    capacity: float | None = None
    """Requests a second the server was found to serve, when the base rate was made from it."""

    @property
    def seconds(self) -> float:
        """Length of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def document(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["phases"] = [asdict(phase) for phase in self.phases]
        if self.requests_sha256 is None:
            # Plans of earlier releases, whose digest is in other files, do not have it.
            del content["requests_sha256"]
        return content

    @property
    def digest(self) -> str:
        """What two processes compare to know that they do the same."""
        return digest_of(self.document())

    def write(self, directory: Path) -> Path:
        """Writes plan.json into a directory, with a copy of the requests, and returns its path.

        Raises:
            LoadError: The request file cannot be read.
        """
        plan = self if self.requests_sha256 else self._with_copy(directory)
        path = directory / PLAN
        write_durably(path, json.dumps(plan.document(), indent=2).encode() + b"\n")
        return path

    def _with_copy(self, directory: Path) -> LoadPlan:
        if self.requests is None:
            return self
        content = read_file(Path(self.requests))
        write_durably(directory / REQUESTS, content)
        return replace(self, requests=REQUESTS, requests_sha256=sha256_hex(content))


def read_file(path: Path) -> bytes:
    """Returns the content of a request file.

    Raises:
        LoadError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadError(f"The request file {path} cannot be read: {error}.") from error


def read_plan(path: Path) -> LoadPlan:
    """Reads a plan.

    Raises:
        LoadError: The file is missing, or not a plan this version can read.
    """
    try:
        content = json.loads(path.read_bytes())
        if content.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        phases = tuple(Phase(**phase) for phase in content.pop("phases"))
        known = {field.name for field in fields(LoadPlan)}
        plan = LoadPlan(**{k: v for k, v in content.items() if k in known}, phases=phases)
        _check_types(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{path} is no load plan ({error}); `forge-harness load run --dry-run` writes one."
        ) from error
    return check_plan(plan)


def _check_types(plan: LoadPlan) -> None:
    """Raises TypeError where a value is not what its field holds: plans are edited by hand."""
    text, number, none = (str,), (int, float), type(None)
    wanted: dict[str, tuple[type, ...]] = {
        "url": text, "seed": (int,), "timeout_s": number, "slo_s": number, "concurrency": (int,),
        "capacity": (*number, none), "name": text, "multiple": number, "rate": number,
        "seconds": number,
    }  # fmt: skip
    values = [(field.name, getattr(plan, field.name)) for field in fields(plan)]
    values += [(f.name, getattr(phase, f.name)) for phase in plan.phases for f in fields(phase)]
    for name, value in values:
        if name != "phases" and type(value) not in wanted.get(name, (str, none)):
            raise TypeError(f"{name} is {value!r}")


def check_plan(plan: LoadPlan) -> LoadPlan:
    """Returns the plan when it can be run.

    Raises:
        LoadError: An address, a rate or a time makes no sense, with the value.
    """
    check_address(plan.url)
    if not plan.phases:
        raise LoadError("A plan without phases sends nothing; give --phases, as 1x:10,5x:5.")
    for phase in plan.phases:
        if not (phase.rate > 0 and phase.seconds > 0):
            raise LoadError(
                f"Phase {phase.name} has {phase.rate:g} requests/s for {phase.seconds:g} s; "
                "expected more than 0 of both."
            )
    for name in ("timeout_s", "slo_s", "concurrency"):
        if not 0 < (value := getattr(plan, name)) < math.inf:
            raise LoadError(f"The plan's {name} is {value:g}; expected more than 0.")
    expected = sum(phase.rate * phase.seconds for phase in plan.phases)
    if expected > MAX_ARRIVALS:
        raise LoadError(
            f"The plan holds about {expected:.0f} requests, over {MAX_ARRIVALS}; lower --rate or "
            "shorten --phases."
        )
    return plan


def check_address(url: str) -> None:
    """Refuses what no request can be sent to.

    Raises:
        LoadError: With the address.
    """
    known = named = False
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        named = "@" in parts.netloc
        host = (parts.hostname or "").encode("idna")  # a label too long, or none, is no name
        known = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    if named:
        raise LoadError(
            "The address holds a user name or a password, which the plan would keep; expected "
            "http://host:port, and a token by --token-env."
        )
    # urlsplit drops line breaks, and takes what no request line can hold.
    if not known or not _is_graphic(url):
        raise LoadError(f"{url!r} is no address; expected http://host:port or https://host:port.")
    if "?" in url or "#" in url:
        raise LoadError(
            f"{url!r} has a query or a fragment, which no request would be sent with; expected "
            "http://host:port, and the query in the paths of --requests."
        )


def bearer_token(plan: LoadPlan) -> str:
    """Returns the token in the environment variable a plan names, "" when it names none.

    A line break after it is left out: files end with one.

    Raises:
        LoadError: The variable is not set, or holds what no header can carry; without its value.
    """
    name = plan.token_env
    if not name:
        return ""
    token = os.environ.get(name, "").rstrip("\r\n")
    if not token:
        raise LoadError(
            f"--token-env {name}: no such environment variable; export {name}=TOKEN first."
        )
    if not _is_graphic(token):
        raise LoadError(
            f"--token-env {name}: the variable holds no token; expected printable ASCII characters "
            "without spaces, and nothing else."
        )
    return token


def _is_graphic(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def phases_at(base: float, shape: Shape) -> tuple[Phase, ...]:
    """Returns phases at multiples of a base rate, in requests a second."""
    return tuple(
        Phase(name=f"{multiple:g}x", multiple=multiple, rate=multiple * base, seconds=seconds)
        for multiple, seconds in shape
    )


def parse_shape(text: str) -> Shape:
    """Reads phases written as `1x:10,5x:5` (multiple of the base rate, seconds).

    Raises:
        LoadError: With the part that is none.
    """
    shape = []
    for part in text.split(","):
        multiple, _, seconds = part.strip().partition(":")
        try:
            pair = (float(multiple.removesuffix("x")), float(seconds.removesuffix("s")))
        except ValueError:
            pair = (0.0, 0.0)
        if not all(0 < value < 1e6 for value in pair):
            raise LoadError(
                f"--phases {text!r}: {part!r} is no phase; expected MULTIPLEx:SECONDS, as 5x:10."
            )
        shape.append(pair)
    return tuple(shape)
