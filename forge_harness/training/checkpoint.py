"""Checkpoints: one safetensors file with everything the future of a run depends on.

One file, so that one rename commits it. Its header holds canonical JSON (task, options, recipe,
tied names) and a digest over all tensors, because safetensors itself does not notice a flipped bit.
Nothing is pickled. A session whose weights are sharded writes a directory instead (`sharded`); what
reads one reads the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forge_harness.canonical import canonical_json, digest_of, sha256_hex
from forge_harness.durable import write_durably
from forge_harness.errors import UsageError
from forge_harness.protocols import TrainOptions
from forge_harness.training.data import DataSource
from forge_harness.training.digests import tensors_digest
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.model_record import checked_record
from forge_harness.training.ranks import OneProcess, Ranks
from forge_harness.training.session import QATSession

FORMAT = "forge-checkpoint/1"
LONGEST_REASON = 400
"""Characters of what torch says of a model that does not fit: it names every tensor."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another run."""


def save_session(session: QATSession, path: Path) -> None:
    """Writes a checkpoint; returns once it is durable (see `Checkpoints.save_session`).

    Args:
        session: What to save; if it is sharded, all its ranks call this together.
        path: The file, by convention `*.safetensors`, or the directory of a sharded session;
            replaced atomically when it is there.

    Raises:
        OSError: The file system refused; what was there is untouched.
    """
    tensors, tied = _untied(session)
    header: dict[str, Any] = {
        "format": FORMAT,
        "identity": _identity(session.task, session.options, session),
        "step": session.step_index,
        "tied": tied,
    }
    if session.ranks.shards:
        from forge_harness.training import sharded

        header["format"] = sharded.FORMAT

        def with_shards(digests: dict[str, str]) -> dict[str, Any]:
            said = header | {"shards": digests, "digest": digest_of(digests)}
            return said | {"header": _header_digest(said)}

        sharded.write_shards(session.ranks, tensors, Path(path), with_shards)
        return
    header["digest"] = tensors_digest(tensors)
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
    ranks: Ranks | None = None,
) -> QATSession:
    """Returns a session that continues where the saved one stopped, bit for bit.

    With other ranks than it was saved with it continues from the same weights, moments, schedule
    and data; the bits are the same as long as the micro-batches are.

    Args:
        task: The task it was saved with.
        options: The options it was saved with.
        path: What `save_session` wrote.
        build_model: As given to `QATSession`.
        load: As given to `QATSession`.
        loss: As given to `QATSession`.
        ranks: As given to `QATSession`.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another task, other
            options or another recipe.
    """
    path, ranks = Path(path), ranks or OneProcess()
    whole = not (ranks.shards and path.is_dir())
    header, tensors = ranks.everywhere(
        lambda: read_checkpoint(path) if whole else (read_header(path), {})
    )
    session = QATSession(task, options, build_model=build_model, load=load, loss=loss, ranks=ranks)
    asked = _identity(task, session.options, session)
    ranks.everywhere(lambda: _refuse_other(header["identity"], asked, path))
    if not whole:
        tensors = _rows(path, header, session)
    ranks.everywhere(lambda: _fill(session, tensors, path))
    return session


def _fill(session: QATSession, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        session.load_state_tensors(tensors)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise CheckpointError(
            f"Checkpoint {path.name} does not fit the model or data of {session.task!r}: {reason}"
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns header and tensors of a checkpoint, tied names filled in.

    Raises:
        CheckpointError: It is missing, damaged or of another format.
    """
    if path.is_dir():
        header, tensors = read_header(path), _read_shards(path, {})
    else:
        header, tensors = _read_file(path)
    for alias, name in header["tied"].items():
        tensors[alias] = tensors[name]
    return header, tensors


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a checkpoint whose content is as it was written.

    Raises:
        CheckpointError: As `read_checkpoint`.
    """
    if not path.is_dir():
        return _read_file(path)[0]
    from forge_harness.training import sharded

    with _as_checkpoint_error(path):
        header = _checked_header(sharded.read_header(path), sharded.shard_names(path))
    _require_format(path, header, sharded.FORMAT)
    return header


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _as_checkpoint_error(path), safe_open(path, framework="pt") as stream:
        names = list(stream.keys())
        header = _checked_header(json.loads((stream.metadata() or {})["forge"]), names)
        tensors: dict[str, Tensor] = {name: stream.get_tensor(name) for name in names}
    _require_format(path, header, FORMAT)
    if header["digest"] != tensors_digest(tensors):
        raise CheckpointError(
            f"{path.name} is damaged: its content does not have the digest in its header; use an "
            "earlier checkpoint."
        )
    return header, tensors


def _read_shards(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from forge_harness.training import sharded

    with _as_checkpoint_error(path):
        return sharded.read_shards(path, like)


def _rows(path: Path, header: Mapping[str, Any], session: QATSession) -> dict[str, Tensor]:
    """Reads of each tensor the rows this rank holds."""
    like: dict[str, Tensor] = {}
    parameters = dict(session.model.named_parameters())
    for name in _stored_names(path):
        owner = name.partition(".")[2].rpartition("/")[0] or name.removeprefix("model.")
        if owner in parameters:
            like[name] = parameters[owner].detach()
    tensors = _read_shards(path, like)
    return tensors | {alias: tensors[name] for alias, name in header["tied"].items()}


def _stored_names(path: Path) -> list[str]:
    from forge_harness.training import sharded

    with _as_checkpoint_error(path):
        return sharded.shard_names(path)


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {str(path)!r}.") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not a checkpoint, or it is damaged ({error}); use an earlier one."
        ) from error


def _require_format(path: Path, header: Mapping[str, Any], expected: str) -> None:
    if header["format"] != expected:
        raise CheckpointError(
            f"{path.name} has format {header['format']!r}, {expected!r} was expected."
        )


def has_session_header(path: Path) -> bool:
    """Whether a path says that it is a session's checkpoint; it may be damaged all the same."""
    if path.is_dir():
        return (path / "checkpoint.json").is_file()
    if path.exists() and not path.is_file():
        return False  # A pipe would be waited for, for ever.
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
    own = {key: value.contiguous() for key, value in tensors.items() if key not in tied}
    return (own if session.ranks.shards else {key: value.cpu() for key, value in own.items()}), tied


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
    chosen |= {"recipe": asdict(session.recipe), "model": session.model_record()}
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
