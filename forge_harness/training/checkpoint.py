"""Checkpoints: one safetensors file with everything the future of a run depends on.

One file, so that one rename commits it. Its header holds canonical JSON (task, options, recipe,
tied names) and a digest over all tensors, because safetensors itself does not notice a flipped bit.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.durable import write_durably
from forge_harness.errors import UsageError
from forge_harness.protocols import TrainOptions
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.model_record import checked_record, model_record
from forge_harness.training.session import QATSession

FORMAT = "forge-checkpoint/1"


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another run."""


def save_session(session: QATSession, path: Path) -> None:
    """Writes a checkpoint; returns once it is durable (see `Checkpoints.save_session`).

    Args:
        session: What to save.
        path: The file, by convention `*.safetensors`; replaced atomically when it is there.

    Raises:
        OSError: The file system refused; a file that was there is untouched.
    """
    tensors, tied = _untied(session)
    header = {
        "format": FORMAT,
        "identity": _identity(session.task, session.options, session),
        "step": session.step_index,
        "tied": tied,
        "digest": _digest(tensors),
    }
    header["header"] = _header_digest(header)
    metadata = {"forge": canonical_json(header).decode()}
    write_durably(Path(path), save(tensors, metadata=metadata))


def resume_session(
    task: str,
    options: TrainOptions,
    path: Path,
    *,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
) -> QATSession:
    """Returns a session that continues where the saved one stopped, bit for bit.

    Args:
        task: The task it was saved with.
        options: The options it was saved with.
        path: The file `save_session` wrote.
        build_model: As given to `QATSession`.
        load: As given to `QATSession`.
        loss: As given to `QATSession`.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another task, other
            options or another recipe.
    """
    header, tensors = read_checkpoint(Path(path))
    session = QATSession(task, options, build_model=build_model, load=load, loss=loss)
    _refuse_other(header["identity"], _identity(task, options, session), Path(path))
    try:
        session.load_state_tensors(tensors)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"Checkpoint {Path(path).name} does not fit the model or data of {task!r}: {reason}"
        ) from error
    return session


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns header and tensors of a checkpoint, tied names filled in.

    Raises:
        CheckpointError: The file is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            header = _checked_header(json.loads((stream.metadata() or {})["forge"]), names)
            tensors: dict[str, Tensor] = {name: stream.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {str(path)!r}.") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not a checkpoint, or it is damaged ({error}); use an earlier one."
        ) from error
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path.name} has format {header['format']!r}, {FORMAT!r} was expected."
        )
    if header["digest"] != _digest(tensors):
        raise CheckpointError(
            f"{path.name} is damaged: its content does not have the digest in its header; use an "
            "earlier checkpoint."
        )
    for alias, name in header["tied"].items():
        tensors[alias] = tensors[name]
    return header, tensors


def has_session_header(path: Path) -> bool:
    """Whether a file says that it is a session's checkpoint; it may be damaged all the same."""
    try:
        with safe_open(path, framework="pt") as stream:
            return "forge" in (stream.metadata() or {})
    except (SafetensorError, OSError):
        return path.name.startswith("step-")


def model_weights(path: Path) -> dict[str, Tensor]:
    """Returns the state dict of the model in a checkpoint, for fine-tuning from it.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return saved_model(path)[0]


def saved_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns the state dict of the model in a checkpoint, and its `model_record` if it has one.

    Both from one reading: the run that wrote the file may let go of it meanwhile.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    header, tensors = read_checkpoint(path)
    prefix = "model."
    weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    record = header["identity"].get("model")
    try:
        return weights, None if record is None else checked_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} does not say what model it is of ({error}); use an earlier one."
        ) from error


def _untied(session: QATSession) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state with shared tensors once, and alias -> name of the others."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, value in session.model.state_dict(keep_vars=True).items():
        if id(value) in first:
            tied[f"model.{key}"] = f"model.{first[id(value)]}"
        first.setdefault(id(value), key)
    tensors = session.state_tensors()
    # safetensors takes nothing else; loading copies into the memory format of the model.
    return {key: value.contiguous() for key, value in tensors.items() if key not in tied}, tied


def _checked_header(header: Any, names: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401 - any JSON
    """Returns a header that has what `save_session` writes; raises KeyError or ValueError."""
    kinds = {"format": str, "identity": dict, "tied": dict, "digest": str}
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    for key, kind in kinds.items():
        if not isinstance(header[key], kind):
            raise ValueError(f"{key!r} of its header is {header[key]!r:.80}")
    for alias, name in header["tied"].items():
        if alias in names or name not in names:
            raise ValueError(f"its header ties {alias!r} to {name!r:.80}")
    # Checkpoints of earlier builds have none.
    if "header" in header and header["header"] != _header_digest(header):
        raise ValueError("its header does not have the digest in it")
    return header


def _header_digest(header: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key != "header"}
    return f"sha256:{sha256_hex(canonical_json(rest))}"


def _identity(task: str, options: TrainOptions, session: QATSession) -> dict[str, Any]:
    """What a resumed run must have in common with the saved one, as JSON values."""
    chosen = asdict(options)
    chosen["validation_canaries"] = [sha256_hex(c) for c in options.validation_canaries]
    chosen |= {"recipe": asdict(session.recipe), "model": model_record(session.model)}
    text = json.dumps({"task": task, **chosen}, default=str)
    # inf (no clipping) is no JSON number.
    identity: dict[str, Any] = json.loads(text, parse_constant=str)
    return identity


def _refuse_other(saved: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    models = saved.get("model"), asked["model"]
    if "model" not in saved:  # By an earlier build.
        asked = {key: value for key, value in asked.items() if key != "model"}
    elif None in models:
        was, now = (model and model["family"] for model in models)
        saved, asked = {**saved, "model": was}, {**asked, "model": now}
    for name, was, now in _differences(saved, asked):
        raise CheckpointError(
            f"{path.name} was saved with {name} {was!r}, and {now!r} was asked for; resume with "
            "the options it was saved with, or start anew."
        )


def _differences(
    saved: Mapping[str, Any], asked: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, object, object]]:
    for key, now in asked.items():
        was, name = saved.get(key), f"{within}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now | dict.fromkeys(was.keys() - now), f"{name}.")
        elif was != now:
            yield name, was, now


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{hasher.hexdigest()}"
