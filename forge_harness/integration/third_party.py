"""Checkpoints judged by readers this package did not write: transformers, gguf, llama.cpp.

Each reader runs in a process of its own (`third_party_child`): it may abort, hang, or want
environment variables before it is imported. `reader_agreement` judges what it computed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_harness.errors import ForgeError, UsageError
from forge_harness.imports import python_program
from forge_harness.integration.child import Child, Log, describe_status
from forge_harness.integration.third_party_child import ARRAYS, READERS, RESULT

TIMEOUT_S = 300.0
"""Longest time one reader may take; importing transformers takes long on a busy machine."""
_POLL_S = 0.1
Tokens = Sequence[Sequence[int]]


class ReaderFailedError(ForgeError):
    """A third-party reader crashed, hung, or could not be asked."""


@dataclass(frozen=True, slots=True)
class NotAvailable:
    """A reader that cannot be asked here.

    Attributes:
        reason: Why, and the remedy.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersReading:
    """What transformers made of a directory.

    Attributes:
        versions: Of transformers, accelerate and torch.
        refused: Why it would not load, or "".
        model_class: Class it built.
        missing: Keys of the model without a tensor.
        unexpected: Tensors without a key.
        mismatched: Keys whose tensor has another shape.
        errors: Messages of the loader.
        ternary: Names of the layers it quantizes.
        arrays: File with `logits`, and `<layer>.input`, `<layer>.output` of each ternary layer;
            None when refused.
        tokens: The token ids it was run over.
    """

    versions: Mapping[str, str]
    refused: str = ""
    model_class: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    ternary: tuple[str, ...] = ()
    arrays: Path | None = None
    tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def complaints(self) -> tuple[str, ...]:
        """Everything the loader did not take as it was, one clause each."""
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "error": self.errors,
        }
        refused = (f"refused: {self.refused}",) if self.refused else ()
        return refused + tuple(f"{kind}: {entry}" for kind, all_ in lists.items() for entry in all_)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """One tensor of a GGUF file, decoded twice.

    Attributes:
        name: In the model's spelling.
        layout: ggml type.
        values: Numbers in it.
        differing: Values that are not exactly codes * float32(fp16(scale)) (codes, where the scale
            is a tensor of its own), or the stored value of a plain tensor.
        worst: Largest difference.
    """

    name: str
    layout: str
    values: int
    differing: int
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFReading:
    """What `gguf` made of a file; `refused` says why it would not read it, or ""."""

    versions: Mapping[str, str]
    refused: str = ""
    tensors: tuple[GGUFTensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppReading:
    """Logits of llama.cpp: `logits` (B, T, V) in the safetensors file `arrays`."""

    versions: Mapping[str, str]
    arrays: Path


def read_with_transformers(
    directory: Path, tokens: Tokens, *, out: Path, hooks: bool = True, timeout_s: float = TIMEOUT_S
) -> TransformersReading | NotAvailable:
    """Loads a directory with `AutoModelForCausalLM.from_pretrained` and runs it, in fp32.

    Args:
        directory: With config.json and safetensors.
        tokens: Token ids, rows of equal length.
        out: Directory for the arrays; made when it is not there.
        hooks: Whether inputs and outputs of the ternary layers are kept.
        timeout_s: Longest time it may take.

    Raises:
        ReaderFailedError: The process crashed or took too long.
        UsageError: `tokens` is empty or ragged.
    """
    rows = _rows(tokens)
    request = {"path": str(directory.absolute()), "tokens": rows, "hooks": hooks}
    answer = _ask("transformers", request, out, timeout_s)
    if isinstance(answer, NotAvailable):
        return answer
    names = ("missing", "unexpected", "mismatched", "errors", "ternary")
    return TransformersReading(
        versions=answer["versions"],
        refused=answer.get("refused", ""),
        model_class=answer.get("class", ""),
        **{name: tuple(answer.get(name, ())) for name in names},
        arrays=None if "refused" in answer else out / ARRAYS,
        tokens=tuple(tuple(row) for row in rows),
    )


def read_with_gguf(path: Path, *, timeout_s: float = TIMEOUT_S) -> GGUFReading | NotAvailable:
    """Decodes every tensor of a GGUF file with `gguf` and with this package.

    Raises:
        ReaderFailedError: The process crashed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="forge-reader-") as out:
        answer = _ask("gguf", {"path": str(path.absolute())}, Path(out), timeout_s)
    if isinstance(answer, NotAvailable):
        return answer
    tensors = tuple(GGUFTensor(**tensor) for tensor in answer.get("tensors", ()))
    return GGUFReading(
        versions=answer.get("versions", {}), refused=answer.get("refused", ""), tensors=tensors
    )


def read_with_llama_cpp(
    path: Path, tokens: Tokens, *, out: Path, timeout_s: float = TIMEOUT_S
) -> LlamaCppReading | NotAvailable:
    """Runs a GGUF file through llama.cpp, where llama-cpp-python is installed.

    Raises:
        ReaderFailedError: The process crashed (llama.cpp aborts on files it half accepts), took too
            long, or refused the file.
        UsageError: `tokens` is empty or ragged.
    """
    request = {"path": str(path.absolute()), "tokens": _rows(tokens)}
    answer = _ask("llama_cpp", request, out, timeout_s)
    if isinstance(answer, NotAvailable):
        return answer
    return LlamaCppReading(versions=answer["versions"], arrays=out / ARRAYS)


def _ask(
    reader: str, request: Mapping[str, Any], out: Path, timeout_s: float
) -> dict[str, Any] | NotAvailable:
    assert reader in READERS
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).unlink(missing_ok=True)
    asked = out / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    module = "forge_harness.integration.third_party_child"
    log = Log(None)
    status = _run([*python_program(module), reader, str(asked), str(out)], log, timeout_s)
    if status is None:
        raise ReaderFailedError(
            f"Reader {reader!r} did not answer within {timeout_s:g} s.{_end(log)}"
        )
    if status or not (out / RESULT).is_file():
        raise ReaderFailedError(
            f"Reader {reader!r} ended its process ({describe_status(status)}).{_end(log)}"
        )
    answer: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    if "not_available" in answer:
        return NotAvailable(answer["not_available"])
    return answer


def _run(command: list[str], log: Log, timeout_s: float) -> int | None:
    """Returns the exit status, or None when the time is up."""
    deadline = time.monotonic() + timeout_s
    with Child(command, log) as child:
        while (status := child.pump(_POLL_S)) is None:
            if time.monotonic() > deadline:
                return None
    return status


def _end(log: Log) -> str:
    """Returns the last lines the process wrote, as a sentence."""
    lines = log.tail().strip().splitlines()[-3:]
    return f" It wrote: {' / '.join(line.strip() for line in lines)}" if lines else ""


def _rows(tokens: Tokens) -> list[list[int]]:
    rows = [list(map(int, row)) for row in tokens]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        lengths = [len(row) for row in rows]
        raise UsageError(f"Token rows have lengths {lengths}; expected rows of one length, over 0.")
    return rows
