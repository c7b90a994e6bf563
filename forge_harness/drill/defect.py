"""What a seeded defect is: a subject with one behaviour changed, and the check that must see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Observable = Callable[[Any], object]
"""What a subject does, as a value `observe.fingerprint` takes. Deterministic, and not a check."""


class Stage(StrEnum):
    """Where in a pipeline a defect sits."""

    QUANTIZER = "quantizer"
    FORWARD = "forward"
    MODEL = "model"
    BACKWARD = "backward"
    PACKING = "packing"
    KERNEL = "kernel"
    TRAINING = "training loop"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    EXPORT = "export"
    SERVING = "serving"
    STATE = "state"
    CONFIGURATION = "configuration"
    SECURITY = "security"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One behaviour of the reference subject changed, as real projects had it changed."""

    id: str
    """An identifier; `forge_harness.drill.defects:<id>` names the subject."""
    title: str
    """What is wrong, in one line without a full stop."""
    stage: Stage
    check: str
    """Id of the check that must go red."""
    shows: str
    """Text in that check's reason: red for another reason is no kill."""
    subject: Callable[[], object]
    """Makes the subject."""
    alive: Observable
    """What differs from the reference subject: a defect that changes nothing proves nothing."""
    source: str = ""
    """Where it happened (`owner/project#issue`, a commit, a file); empty for our own."""
    subtlety: int = 3
    """1 obvious to 5 very subtle."""

    def __post_init__(self) -> None:
        if not self.id.isidentifier():
            raise ValueError(f"Defect {self.id!r}: the id must be an identifier.")
        if not self.shows.strip():
            raise ValueError(
                f"Defect {self.id!r}: shows is {self.shows!r}; expected words of the check's "
                "reason, without which any reason would do."
            )
        if not 1 <= self.subtlety <= 5:
            raise ValueError(f"Defect {self.id!r}: subtlety {self.subtlety}; expected 1 to 5.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benign:
    """A sound subject of another kind than the reference: every check that is red is wrong."""

    id: str
    title: str
    subject: Callable[[], object]
    checks: tuple[str, ...]
    """Ids of checks, or of suites, that must not go red."""
    but: tuple[str, ...] = ()
    """Ids of checks of these suites that cannot be measured for it."""
