"""GGUF files: TQ1_0 and TQ2_0, I2_S where its layout is told, and dense ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError, NonTernaryCodeError
from forge_harness.quant import EPS

from . import i2s, tq
from .architecture import Style, style_of, transformers_model
from .checkpoint import (
    Anomaly,
    Checkpoint,
    Detection,
    I2SLayout,
    ModelDescription,
    ReadOptions,
    TensorInfo,
    files_beside,
)
from .gguf_arch import FAMILIES, OWN, own_name, rotated_heads, translated
from .gguf_config import config_of, contradiction
from .gguf_file import GgufFile, GgufTensor, damaged
from .gguf_notes import Notes, read_notes
from .gguf_rope import halved, interleaving, obstacle, with_rows
from .gguf_types import I2_S, TERNARY
from .native_common import check_tensors
from .tensors import TernaryTensor

_MAGIC = b"GGUF"
_SCALES = (".scale", "_scale")
_FREQUENCIES = "rope_freqs.weight"
_QUESTION = (
    "I2_S has three byte layouts under one type id and no marker; tell which with --i2s-layout "
    "x86-act (the published files), arm or x86-rows."
)


@dataclass
class GgufCheckpoint(Checkpoint):
    """An open GGUF file under canonical names."""

    file: GgufFile = field(kw_only=True)
    notes: Notes = field(kw_only=True)
    stored: Mapping[str, GgufTensor] = field(kw_only=True)
    """Canonical name -> tensor of the file."""
    apart: Mapping[str, GgufTensor] = field(kw_only=True)
    """Canonical name of a ternary tensor -> the tensor its scale is in."""
    heads: Mapping[str, int] = field(kw_only=True)
    """Canonical name -> heads over which llama.cpp reorders its rows."""
    i2s_layout: I2SLayout | None = None

    def ternary(self, name: str) -> TernaryTensor:
        """See `Checkpoint.ternary`."""
        try:
            found = self._decoded(name)
        except NonTernaryCodeError as error:
            raise self._damaged(name, f"has {error}") from error
        if heads := self.heads.get(name):
            return with_rows(found, torch.argsort(interleaving(found.rows, heads)))
        return found

    def scales(self, name: str) -> Tensor:
        """See `Checkpoint.scales`."""
        known = self.notes.scales.get(self.stored[name].name)
        return torch.tensor([known]) if known is not None else self.ternary(name).scales

    def plain(self, name: str) -> Tensor:
        """See `Checkpoint.plain`."""
        tensor = self._read_plain(self.stored[name])
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise self._damaged(name, "holds NaN or infinity; expected finite values")
        return halved(tensor, self.heads[name]) if self.heads.get(name) else tensor

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self.file.close()

    def _read_plain(self, stored: GgufTensor) -> Tensor:
        assert stored.type.dtype is not None
        flat = torch.frombuffer(self.file.read(stored), dtype=stored.type.dtype)
        return flat.reshape(stored.shape)

    def _decoded(self, name: str) -> TernaryTensor:
        stored = self.stored[name]
        rows, width = stored.shape
        if stored.type.id == I2_S:
            return self._i2s(name, stored, rows, width)
        nbytes = tq.row_bytes(stored.type.id, width)

        def read(start: int, stop: int) -> bytearray:
            return self.file.read(stored, start * nbytes, (stop - start) * nbytes)

        packed, d, zero = tq.decode(stored.type.id, rows, width, read)
        scale = self._scale(name, stored, d, zero)
        columns = self.infos[name].shape[1]
        if columns < width:
            if (packed[:, columns:] != 0x55).any():
                raise self._damaged(name, f"has codes in the padding behind column {columns}")
            packed = packed[:, :columns].contiguous()
        return TernaryTensor(packed, rows, torch.tensor([scale]), (rows,))

    def _i2s(self, name: str, stored: GgufTensor, rows: int, columns: int) -> TernaryTensor:
        assert self.i2s_layout is not None
        if problem := i2s.obstacle(self.i2s_layout, rows, columns):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot have layout {self.i2s_layout!r}: {problem}; "
                "name another one with --i2s-layout."
            )
        found = i2s.decode(
            self.i2s_layout, rows, columns, lambda a, b: self.file.read(stored, a, b - a)
        )
        if not (found.scales.isfinite() & (found.scales > 0)).all():
            raise self._damaged(name, f"has scale {float(found.scales[0])} in its tail")
        return found

    def _scale(
        self, name: str, stored: GgufTensor, d: NDArray[np.uint16], zero: NDArray[np.bool_]
    ) -> float:
        used = d[~zero]
        block = float(used[:1].view(np.float16)[0]) if used.size else 0.0
        if (different := len(np.unique(used))) > 2:
            # One that differs is damage; these are what ggml makes of a weight of any values.
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {different} scales, each block of "
                f"{tq.BLOCK} values its own, as ggml quantizes weights that are not ternary; "
                "expected one: convert the original checkpoint instead."
            )
        if used.size and not (used == used[0]).all():
            at = np.argwhere(~zero & (d != used[0]))[0]
            raise self._damaged(
                name,
                f"has d = {float(d[tuple(at)].view(np.float16))} in block {at[1]} of row {at[0]} "
                f"and {block} before it; a BitNet weight has one scale",
            )
        if used.size and not 0 < block < float("inf"):
            raise self._damaged(name, f"has d = {block}; expected a positive finite number")
        exact = self.notes.scales.get(stored.name)
        if name in self.apart:
            value = float(self._read_plain(self.apart[name]).float())
            scale = value * block if used.size else value
        else:
            scale = block or (exact if exact is not None else EPS)
            if exact is not None and used.size and float(np.float16(exact)) != block:
                raise self._damaged(
                    name, f"has d = {block}, and 'forge.scales' records {exact}, which is another"
                )
        if not 0 < scale < float("inf"):
            raise self._damaged(name, f"has scale {scale}; expected a positive finite number")
        if exact is not None and name in self.apart and np.float32(scale) != np.float32(exact):
            raise self._damaged(name, f"has scale {scale}, and 'forge.scales' records {exact}")
        return scale if exact is None else exact

    def _damaged(self, name: str, what: str) -> DamagedCheckpointError:
        return damaged(self.file.path, f"tensor {name!r} {what}", name)


def recognise(path: Path) -> Detection | None:
    """Says what a GGUF file is, or None when the path is none.

    Raises:
        CheckpointError: A version or tensor type that is not read.
        DamagedCheckpointError: The header is not as the format demands.
    """
    file = _gguf(path)
    if file is None:
        return None
    with GgufFile(file) as opened:
        kinds = Counter(t.type.name for t in opened.tensors.values())
        architecture = opened.metadata.get("general.architecture", "none")
        version = opened.version
    ternary = {name: kinds[name] for name in ("TQ1_0", "TQ2_0", "I2_S") if kinds[name]}
    most = max(ternary, key=ternary.__getitem__) if ternary else ""
    reasons = (
        f"magic GGUF, version {version}",
        f"architecture {architecture!r}",
        "tensor types " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
    )
    return Detection(
        f"gguf-{most.lower()}" if most else "gguf-float",
        reasons,
        questions=(_QUESTION,) if kinds["I2_S"] else (),
    )


def open_gguf(path: Path, options: ReadOptions) -> Checkpoint:
    """Opens a GGUF file.

    Raises:
        CheckpointError: The layout of I2_S must be told, a tensor type is not read, or the file is
            one of several that make up a model.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """
    found = _gguf(path)
    assert found is not None
    file = GgufFile(found)
    try:
        return _opened(path, file, options)
    except BaseException:
        file.close()
        raise


def _gguf(path: Path) -> Path | None:
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        others = any(path.glob("*.safetensors")) or (path / "forge.json").exists()
        return files[0] if len(files) == 1 and not others else None
    with path.open("rb") as stream:
        return path if stream.read(4) == _MAGIC else None


def _opened(path: Path, file: GgufFile, options: ReadOptions) -> GgufCheckpoint:
    _refuse_part(file)
    notes = read_notes(file)
    architecture = str(file.metadata.get("general.architecture", ""))
    model, style = _model(file, notes, architecture)
    if style is not None:
        _refuse_frequencies(file)
    apart, names = _names(file, style)
    stored = {name: file.tensors[raw] for name, raw in names.items()}
    infos = {name: _info(file, name, t, notes, name in apart) for name, t in stored.items()}
    kinds = {t.type.id for t in stored.values()}
    if I2_S in kinds and options.i2s_layout is None:
        raise CheckpointError(f"{file.path}: {_QUESTION}")
    tied = _tied(file, notes, style, model)
    shapes = {name: info.shape for name, info in infos.items()}
    if problem := check_tensors(model, shapes, tied):
        raise damaged(file.path, problem[1], problem[0])
    twin = transformers_model(model) if style is not None else None
    heads = {name: rotated_heads(architecture, raw, twin) for name, raw in names.items()}
    _check_rows(file, infos, heads)
    facts: dict[str, object] = {
        "scale_convention": "multiply",
        "packing": next((t.type.name for t in stored.values() if t.type.id in TERNARY), "none"),
        "architecture": architecture,
    }
    if notes.compute is not None:
        facts["compute"] = notes.compute
    if options.i2s_layout is not None and I2_S in kinds:
        facts["i2s_layout"] = options.i2s_layout
    most = Counter(t.type.name for t in stored.values() if t.type.id in TERNARY).most_common(1)
    return GgufCheckpoint(
        format=f"gguf-{most[0][0].lower()}" if most else "gguf-float",
        path=path,
        model=model,
        infos=infos,
        tied=tied,
        quantization=facts,
        anomalies=_anomalies(infos),
        extras=notes.extras,
        unread=files_beside(path, {file.path.name}) if path.is_dir() else (),
        file=file,
        notes=notes,
        stored=stored,
        apart={name: t for name, t in apart.items() if name in infos},
        heads=heads,
        i2s_layout=options.i2s_layout,
    )


def _refuse_part(file: GgufFile) -> None:
    count = file.metadata.get("split.count", 1)
    if count not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one of {count} files of a split model; expected a whole one: join "
            "them with `llama-gguf-split --merge` first."
        )


def _refuse_frequencies(file: GgufFile) -> None:
    """No configuration follows from scaled frequencies, and without them it is another model."""
    if _FREQUENCIES in file.tensors:
        raise CheckpointError(
            f"{file.path} holds {_FREQUENCIES!r}, the scaled rotary frequencies of Llama 3.1 and "
            "later, which are not read; convert the original checkpoint instead."
        )


def _check_rows(file: GgufFile, infos: Mapping[str, TensorInfo], heads: Mapping[str, int]) -> None:
    for name, count in heads.items():
        if count and (problem := obstacle(infos[name].shape[0], count)):
            raise damaged(
                file.path, f"tensor {name!r} has no row order of llama.cpp: {problem}", name
            )


def _model(
    file: GgufFile, notes: Notes, architecture: str
) -> tuple[ModelDescription, Style | None]:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    if notes.model is None:
        if architecture in FAMILIES:
            return config_of(file.path, file.metadata, architecture, shapes), "hf"
        return ModelDescription("unknown", {}), None
    style = style_of(notes.model.family) if translated(architecture) else None
    if style is None:
        return notes.model, None
    if not architecture.startswith(OWN) and (
        problem := contradiction(file.metadata, architecture, transformers_model(notes.model))
    ):
        raise damaged(file.path, problem)
    if style == "byte-lm" and notes.model.config.get("fused_qkv"):
        return transformers_model(notes.model), "hf"
    return notes.model, style


def _names(file: GgufFile, style: Style | None) -> tuple[dict[str, GgufTensor], dict[str, str]]:
    """Returns canonical name -> tensor with its scale, and -> name in the file."""
    ternary = {name for name, t in file.tensors.items() if t.type.id in TERNARY}
    scales: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        owner = next(
            (
                weight
                for ending in _SCALES
                if name.endswith(ending)
                for weight in (name.removesuffix(ending), f"{name.removesuffix(ending)}.weight")
                if weight in ternary
            ),
            None,
        )
        own = own_name(owner or name, style)
        taken = (names if owner is None else scales).get(own)
        if taken is not None:
            raise damaged(file.path, f"tensors {taken!r} and {name!r} both mean {own!r}", name)
        if owner is None:
            names[own] = name
            continue
        if tensor.type.dtype is None or len(tensor.shape) != 1 or tensor.shape[0] != 1:
            raise damaged(file.path, f"tensor {name!r} is no single scale", name)
        scales[own] = name
    return {own: file.tensors[name] for own, name in scales.items()}, names


def _info(file: GgufFile, name: str, tensor: GgufTensor, notes: Notes, apart: bool) -> TensorInfo:
    if tensor.type.id not in TERNARY:
        if tensor.type.dtype is None:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is {tensor.type.name}, which is neither ternary nor "
                "a float type; convert the original checkpoint instead."
            )
        layout = {"F32": "F32", "F16": "F16", "BF16": "BF16"}.get(tensor.type.name)
        return TensorInfo(name, "plain", tensor.shape, layout or tensor.type.name, tensor.nbytes)
    if len(tensor.shape) != 2:
        raise damaged(file.path, f"tensor {name!r} has shape {tensor.shape}; expected (N, K)", name)
    shape = (tensor.shape[0], notes.columns.get(tensor.name, tensor.shape[1]))
    nbytes = tensor.nbytes + (4 if apart else 0)
    return TensorInfo(name, "ternary", shape, tensor.type.name, nbytes, shape[:1])


def _tied(
    file: GgufFile, notes: Notes, style: Style | None, model: ModelDescription
) -> dict[str, str]:
    if notes.tied is not None and (notes.model is None or notes.model.family == model.family):
        return dict(notes.tied)
    if style == "hf" and "output.weight" not in file.tensors:
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}


def _anomalies(infos: Mapping[str, TensorInfo]) -> list[Anomaly]:
    kinds = Counter(info.layout for info in infos.values() if info.kind == "ternary")
    found = []
    if len(kinds) > 1:
        mix = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        found.append(Anomaly(f"ternary tensors are stored in several types: {mix}"))
    return found
