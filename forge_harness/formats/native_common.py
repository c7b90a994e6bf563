"""What both versions of the native package share: versions, model, and checks of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from forge_harness.canonical import canonical_json
from forge_harness.errors import CheckpointError, DamagedCheckpointError, NonTernaryCodeError

from .architecture import expected_tensors, renamed, transformers_model
from .checkpoint import ModelDescription
from .safetensors_file import SafetensorsFile
from .tensors import TernaryTensor, check_packed_fields, row_chunks

NEWEST = (1, 0)
"""Newest version this release reads and the one it writes."""
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_HEADS = {"byte-lm": ("head.weight", "embedding.weight")}
_HF_HEAD = ("lm_head.weight", "model.embed_tokens.weight")


def parse_version(text: object) -> tuple[int, int] | None:
    """Returns (major, minor) of "major.minor", or None for anything else."""
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else None


def check_version(path: Path, text: object, reads: tuple[int, int]) -> None:
    """Refuses another version than the one a reader is for.

    Raises:
        CheckpointError: A version this release does not know.
        DamagedCheckpointError: No version at all.
    """
    version = parse_version(text)
    if version is None:
        damaged(path, f"version {text!r} is not of the form '{reads[0]}.{reads[1]}'")
    if version > NEWEST:
        raise CheckpointError(
            f"{path}: this package is version {text}, this release reads up to "
            f"{NEWEST[0]}.{NEWEST[1]}; upgrade bitnet-forge-harness."
        )
    if version != reads:
        raise CheckpointError(
            f"{path}: version {text} is none that was ever written here; expected "
            f"{reads[0]}.{reads[1]}. Ask whoever made the package."
        )


def model_of(path: Path, value: object) -> ModelDescription:
    """Returns the model a package names.

    Raises:
        DamagedCheckpointError: It is not {"family": string, "config": object}.
    """
    if not isinstance(value, dict) or set(value) != {"family", "config"}:
        damaged(path, f"'model' is {value!r}; expected exactly family and config")
    family, config = value["family"], value["config"]
    if not isinstance(family, str) or not isinstance(config, dict):
        damaged(path, "'model' must have a string 'family' and an object 'config'")
    return ModelDescription(family, config)


def tied_pair(model: ModelDescription) -> tuple[str, str] | None:
    """Returns (head, embedding) where the family computes both from one tensor, else None."""
    if model.family in _HEADS:
        return _HEADS[model.family]
    if model.family in ("bitnet", "llama"):
        return _HF_HEAD if model.config.get("tie_word_embeddings") else None
    return None


def expected_shapes(model: ModelDescription) -> dict[str, tuple[int, ...]] | None:
    """Returns name -> shape of every tensor the model has, a tied head left out.

    None: this package does not know the family.

    Raises:
        CheckpointError: The configuration lacks what the shapes follow from.
    """
    try:
        if model.family == "digits":
            return _digits_shapes(model.config)
        if model.family == "byte-lm":
            return _byte_lm_shapes(model)
        return expected_tensors(model)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"The configuration of model family {model.family!r} lacks or has a wrong {error}; "
            "the shapes of its tensors cannot be checked."
        ) from error


def check_tensors(
    model: ModelDescription, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> tuple[str, str] | None:
    """Compares the tensors there are with those the model has.

    Args:
        model: What the files say about the model.
        shapes: Name -> shape of every tensor that is stored.
        tied: Alias -> name of the others.

    Returns:
        (tensor, what is wrong with it) of the first that is missing, left over or of another
        shape; None when all is well or the family is not known.

    Raises:
        CheckpointError: The configuration lacks what the shapes follow from.
    """
    if problem := _dangling(shapes, tied) or _too_deep(model, len(shapes)):
        return problem
    expected = expected_shapes(model)
    if expected is None:
        return None
    full = {**shapes, **{alias: shapes[name] for alias, name in tied.items()}}
    pair = tied_pair(model)
    # transformers makes a tied head itself; a byte LM's state dict has it under both names.
    if pair and (pair[0] in full or model.family == "byte-lm"):
        expected[pair[0]] = expected[pair[1]]
    for name, shape in expected.items():
        if name not in full:
            return name, f"tensor {name!r} is missing; the model has it with shape {shape}"
        if full[name] != shape:
            return name, f"tensor {name!r} has shape {full[name]}; the model has it with {shape}"
    for name in full:
        if name not in expected:
            return name, f"tensor {name!r} is left over; no part of the model has that name"
    return None


def written_json(value: Any, where: str) -> bytes:  # noqa: ANN401 - any JSON value
    """Returns configuration, ties or extras of a source as canonical JSON.

    Raises:
        CheckpointError: They hold what canonical JSON has not, which `where` therefore cannot hold.
    """
    try:
        return canonical_json(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The model's configuration or the extras cannot be written to {where}: {error}."
        ) from error


def read_scales(file: SafetensorsFile, name: str, tensor: str, count: int) -> Tensor:
    """Returns the fp32 scales stored under `name`: finite, greater than 0.

    Raises:
        DamagedCheckpointError: They are missing, of another dtype or shape, or one is NaN,
            infinite, zero or negative; names `tensor`, whose scales they are.
    """
    expect(file, name, "F32", (count,), tensor)
    scales = file.read(name)
    for index, value in enumerate(scales.tolist()):
        if not 0 < value < float("inf"):
            damaged(
                file.path,
                f"scale {index} of tensor {tensor!r} ({name!r}) is {value}; expected a positive "
                "finite number",
                tensor,
            )
    return scales


def expect(
    file: SafetensorsFile, name: str, dtype: str, shape: tuple[int, ...], tensor: str
) -> None:
    """Refuses a file that lacks a tensor, or has it with another dtype or shape.

    Raises:
        DamagedCheckpointError: With what is stored and what was expected.
    """
    stored = file.tensors.get(name)
    if stored is None:
        damaged(file.path, f"tensor {name!r} is missing", tensor)
    if (stored.dtype, stored.shape) != (dtype, shape):
        damaged(
            file.path,
            f"tensor {name!r} is {stored.dtype} {list(stored.shape)}; expected {dtype} "
            f"{list(shape)}",
            tensor,
        )


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuses a plain tensor with a NaN or an infinity.

    Raises:
        DamagedCheckpointError: With the index of the first.
    """
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start, stop in row_chunks(flat.numel(), 1):
        bad = ~torch.isfinite(flat[start:stop])
        if bad.any():
            index = start + int(bad.int().argmax())
            damaged(
                path,
                f"tensor {name!r} holds {float(flat[index])} at index {index}; expected finite "
                "numbers",
                name,
            )


def check_fields(path: Path, name: str, ternary: TernaryTensor) -> None:
    """Refuses codes that are none, and padding rows that hold anything but code 0.

    Raises:
        DamagedCheckpointError: With row, column and byte of the first bad field.
    """
    try:
        check_packed_fields(ternary.packed)
    except NonTernaryCodeError as error:
        damaged(path, f"tensor {name!r} holds {error}", name)
    quarter = ternary.packed.shape[0]
    for row in range(ternary.rows, 4 * quarter):
        field = (ternary.packed[row % quarter] >> (2 * (row // quarter))) & 3
        if bool((field != 1).any()):
            column = int((field != 1).int().argmax())
            damaged(
                path,
                f"tensor {name!r} has {ternary.rows} rows, and the padding at row {row}, column "
                f"{column} holds field {int(field[column])}; expected 1",
                name,
            )


def damaged(path: Path, what: str, tensor: str = "") -> NoReturn:
    """Raises DamagedCheckpointError with one sentence."""
    raise DamagedCheckpointError(
        f"{path} is damaged: {what}. Get the package again.", path=str(path), tensor=tensor
    )


def _dangling(
    shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> tuple[str, str] | None:
    for alias, name in tied.items():
        if name not in shapes:
            return alias, f"tensor {alias!r} is tied to {name!r}, which is not stored"
        if alias in shapes:
            return alias, f"tensor {alias!r} is tied to {name!r} and stored as well"
    return None


def _too_deep(model: ModelDescription, stored: int) -> tuple[str, str] | None:
    """A configuration must not make a reader list more layers than there can be."""
    for key in ("layers", "blocks", "num_hidden_layers"):
        value = model.config.get(key)
        if isinstance(value, int) and value > stored:
            return "", f"the model has {key} {value}, and only {stored} tensors are stored"
    return None


def _byte_lm_shapes(model: ModelDescription) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in (expected_tensors(transformers_model(model)) or {}).items():
        own = renamed(name, "hf", "byte-lm")
        assert own is not None
        found[own] = shape
    if model.config["fused_qkv"]:
        return _fused(found)
    return found


def _fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attention)\.[qkv]\.weight", name):
            found[f"{match[1]}.qkv.weight"] = (3 * shape[0], shape[1])
        else:
            found[name] = shape
    return found


def _digits_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    inputs, width, hidden, blocks, classes = (
        int(config[key]) for key in ("inputs", "width", "hidden", "blocks", "classes")
    )
    found: dict[str, tuple[int, ...]] = {
        "stem.weight": (width, inputs),
        "head.weight": (classes, width),
    }
    for index in range(blocks):
        block = f"blocks.{index}"
        found[f"{block}.norm.weight"] = (width,)
        found[f"{block}.up.weight"] = (hidden, width)
        found[f"{block}.down.weight"] = (width, hidden)
        if config["sub_norm"]:
            found[f"{block}.down.norm.weight"] = (hidden,)
    return found
