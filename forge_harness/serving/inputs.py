"""What a request asks for, checked: rows of numbers, or a prompt and how to continue it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_harness.errors import several

from .package import Classifier, Completer, Served
from .problems import NOT_FOUND, UNPROCESSABLE, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ROWS = 64
DEFAULT_TOKENS = 16
_NUMBERS = frozenset({int, float})


@dataclass(frozen=True, slots=True)
class Completion:
    """What is to be continued, and how.

    Attributes:
        prompt: Token ids.
        max_tokens: Most tokens to add.
        temperature: 0: the likeliest token.
        seed: Of the sampling.
        stream: Whether tokens are wanted as they come.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stream: bool


def rows_of(body: Mapping[str, Any], served: Classifier) -> NDArray[np.float32]:
    """Reads `inputs`.

    Returns:
        fp32 (rows, inputs), finite.

    Raises:
        Problem: UNPROCESSABLE, or NOT_FOUND for another model.
    """
    _check_members(body, {"inputs", "model"}, served)
    rows = body.get("inputs")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
        found = several(len(rows), "row") if isinstance(rows, list) else type(rows).__name__
        raise Problem(
            UNPROCESSABLE, f"'inputs' is {found}; expected a list of 1 to {MAX_ROWS} rows."
        )
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != served.inputs:
            found = several(len(row), "value") if isinstance(row, list) else type(row).__name__
            raise Problem(
                UNPROCESSABLE,
                f"Row {index} is {found}; expected a list of {served.inputs} numbers.",
            )
        # bool is an int to Python and text converts in numpy, so types are compared.
        if not _NUMBERS.issuperset(map(type, row)):
            wrong = next(value for value in row if type(value) not in _NUMBERS)
            raise Problem(
                UNPROCESSABLE,
                f"Row {index} holds a {type(wrong).__name__}; expected numbers only.",
            )
    return _finite(rows)


def completion_of(body: Mapping[str, Any], served: Completer) -> Completion:
    """Reads a request for a completion.

    Raises:
        Problem: UNPROCESSABLE, or NOT_FOUND for another model.
    """
    known = {"prompt", "max_tokens", "temperature", "seed", "stream", "model"}
    _check_members(body, known, served)
    prompt = _prompt(body.get("prompt"), served.vocabulary)
    max_tokens = _integer(body, "max_tokens", DEFAULT_TOKENS, 1, served.context)
    if len(prompt) + max_tokens - 1 > served.context:
        raise Problem(
            UNPROCESSABLE,
            f"{several(len(prompt), 'token')} of prompt and {max_tokens} more; expected at most "
            f"{served.context + 1} in all: shorten the prompt or ask for fewer.",
        )
    temperature = body.get("temperature", 0.0)
    if type(temperature) not in _NUMBERS or not 0 <= temperature <= 100:
        raise Problem(
            UNPROCESSABLE, f"'temperature' is {_shown(temperature)}; expected a number, 0 to 100."
        )
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise Problem(UNPROCESSABLE, f"'stream' is {_shown(stream)}; expected true or false.")
    if body.get("seed") is None:
        # The likeliest token needs none, and the system's random numbers cost 0.2 ms under load.
        seed = secrets.randbits(53) if temperature else 0
    else:
        seed = _integer(body, "seed", 0, 0, 2**63 - 1)
    return Completion(prompt, max_tokens, float(temperature), seed, stream)


def _check_members(body: Mapping[str, Any], known: set[str], served: Served) -> None:
    if unknown := sorted(body.keys() - known):
        raise Problem(
            UNPROCESSABLE, f"{_shown(unknown[0])} is no member; valid: {', '.join(sorted(known))}."
        )
    model = body.get("model", served.name)
    if model != served.name:
        raise Problem(NOT_FOUND, f"There is no model {_shown(model)}; {served.name!r} is served.")


def _finite(rows: list[list[Any]]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            values = np.array(rows, dtype=np.float64).astype(np.float32)
    except OverflowError as error:
        raise Problem(UNPROCESSABLE, "A number is beyond float64; scale the inputs.") from error
    if not np.isfinite(values).all():
        raise Problem(UNPROCESSABLE, "A number is beyond float32; scale the inputs.")
    return values


def _prompt(prompt: object, vocabulary: int) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            tokens: tuple[Any, ...] = tuple(prompt.encode())
        except UnicodeEncodeError as error:
            raise Problem(
                UNPROCESSABLE, "'prompt' holds half of a surrogate pair; send whole characters."
            ) from error
    elif isinstance(prompt, list):
        tokens = tuple(prompt)
    else:
        raise Problem(
            UNPROCESSABLE,
            f"'prompt' is a {type(prompt).__name__}; expected text or a list of token ids.",
        )
    if not tokens:
        raise Problem(UNPROCESSABLE, "'prompt' is empty; expected at least one token.")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise Problem(
                UNPROCESSABLE,
                f"'prompt' holds {_shown(token)}; expected token ids below {vocabulary}.",
            )
    return tokens


def _integer(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise Problem(
            UNPROCESSABLE, f"{name!r} is {_shown(value)}; expected an integer, {low} to {high}."
        )
    return value


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
