"""Hugging Face directories and safetensors files, by what the tensors are and config.json says.

Packed codes, float codes with a scale, dense products of both, master weights to be quantized at
every forward ("online"), and full precision that is quantized on import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError, several

from .architecture import HF_FAMILIES, PROJECTIONS, role_of
from .checkpoint import (
    Anomaly,
    Checkpoint,
    Detection,
    ModelDescription,
    ReadOptions,
    ScaleConvention,
    TensorInfo,
    biases_of,
)
from .hf_config import HfConfig, Quantization, find_config
from .hf_files import CONFIG, TensorFiles, TensorSource, holds_safetensors, open_files
from .legacy import FLOATS, Selection, masters, select, stored_weights
from .native_common import check_tensors
from .tensors import TernaryTensor
from .weights import StoredWeight, absmean_scales, fake_scale, read_finite, read_weight

SCALE = "_scale"
_HEAD = "lm_head.weight"
_HARMLESS = ("rotary_emb.inv_freq",)
"""Buffers old exporters wrote and every reader computes."""
_QUESTION = (
    "Whether weight_scale multiplies the codes (autobitlinear) or divides them (bitlinear) stands "
    "in config.json only, and there is none that says; tell with --scale-convention multiply or "
    "divide."
)


@dataclass
class FloatCheckpoint(Checkpoint):
    """Ternary weights stored any of four ways, by name, over a source of tensors."""

    source: TensorSource | None = None
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    """Plain tensor -> what multiplies its stored values."""
    _scales: dict[str, Tensor] = field(default_factory=dict)

    def ternary(self, name: str) -> TernaryTensor:
        """See `Checkpoint.ternary`."""
        return read_weight(self._source, self.weights[name], self._scales.get(name))

    def scales(self, name: str) -> Tensor:
        """See `Checkpoint.scales`; those of a master are averaged once."""
        if name not in self._scales:
            self._scales[name] = absmean_scales(self._source, self.weights[name])
        return self._scales[name]

    def plain(self, name: str) -> Tensor:
        """See `Checkpoint.plain`."""
        tensor = read_finite(self._source, name)
        factor = self.factors.get(name)
        return tensor if factor is None else tensor.float() * factor

    def master(self, name: str) -> Tensor:
        """See `Checkpoint.master`."""
        if self.infos[name].master:
            return read_finite(self._source, name)
        return super().master(name)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._source.close()

    @property
    def _source(self) -> TensorSource:
        assert self.source is not None
        return self.source


@dataclass(frozen=True, slots=True)
class _Found:
    """What a look at headers, config.json and the start of some tensors tells."""

    detection: Detection
    files: TensorFiles
    config: HfConfig | None
    model: ModelDescription
    selection: Selection | None
    weights: Mapping[str, StoredWeight]


def recognise(path: Path) -> Detection | None:
    """Says what safetensors files are, or None when there are none.

    Raises:
        CheckpointError: Which files make up the model cannot be told.
        DamagedCheckpointError: Header, index or config.json is broken.
    """
    if (path / "forge.json").exists() or not holds_safetensors(path):
        return None
    found = _look(path, ReadOptions())
    found.files.close()
    return found.detection


def open_hf(path: Path, options: ReadOptions) -> Checkpoint:
    """Opens a directory or file of safetensors.

    Raises:
        CheckpointError: Something must be told, or an option contradicts config.json.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """
    found = _look(path, options)
    try:
        return _opened(path, found, options)
    except BaseException:
        found.files.close()
        raise


def _look(path: Path, options: ReadOptions) -> _Found:
    config = find_config(path)
    files = open_files(path)
    try:
        return _classified(path, files, config, options)
    except BaseException:
        files.close()
        raise


def _classified(
    path: Path, files: TensorFiles, config: HfConfig | None, options: ReadOptions
) -> _Found:
    model = _model(config)
    for alias, name in _tied(config, model).items():
        if alias in files.tensors and name not in files.tensors:
            # As safetensors' own `save_model` keeps the first name in the alphabet.
            files.rename(alias, name)
    quantization = config.quantization if config else None
    reasons = [
        f"{several(len(files.paths), 'safetensors file')}, {several(len(files.tensors), 'tensor')}",
        _config_reason(config),
    ]
    packed = [n for n, t in files.tensors.items() if t.dtype == "U8" and n.endswith(".weight")]
    scaled = [n for n in files.tensors if n.endswith(".weight") and n + SCALE in files.tensors]
    if packed or scaled:
        return _stored_codes(files, config, model, packed, scaled, reasons)
    selection = select(files, model.family, quantization, options)
    online = quantization is not None and quantization.mode == "online"
    weights = (masters if online else stored_weights)(files, selection.ternary)
    fake = bool(weights) and all(w.storage == "fake" for w in weights.values())
    if quantization is not None and not online:
        raise DamagedCheckpointError(
            f"{path}: config.json says quantization_mode 'offline', and no tensor holds codes with "
            "a weight_scale; say 'online' where master weights are stored.",
            path=str(path),
        )
    kind = "hf-online" if online else "hf-fake-quant" if fake else "legacy-safetensors"
    reasons.append(
        f"{several(len(weights), 'floating matrix', 'floating matrices')} and no weight_scale; "
        + (
            "each has the three values -b, 0, b"
            if fake
            else f"{sum(w.storage == 'master' for w in weights.values())} of them full precision"
        )
    )
    if kind == "legacy-safetensors":
        reasons.append(f"quantized on import: {selection.rule}")
    return _Found(Detection(kind, tuple(reasons)), files, config, model, selection, weights)


def _stored_codes(
    files: TensorFiles,
    config: HfConfig | None,
    model: ModelDescription,
    packed: list[str],
    scaled: list[str],
    reasons: list[str],
) -> _Found:
    kind = "hf-packed" if packed else "hf-unpacked"
    names = packed or scaled
    reasons.append(
        f"{several(len(names), 'weight')} of {'packed codes (U8)' if packed else 'float codes'} "
        "with a weight_scale each"
    )
    known = config is not None and config.quantization is not None
    questions = () if known else (_QUESTION,)
    detection = Detection(kind, tuple(reasons), questions=questions)
    return _Found(detection, files, config, model, None, {})


def _opened(path: Path, found: _Found, options: ReadOptions) -> Checkpoint:
    quantization = found.config.quantization if found.config else None
    facts: dict[str, object] = {}
    weights = dict(found.weights)
    factors: dict[str, float] = {}
    if found.selection is None:
        convention = _convention(path, quantization, options)
        weights = _coded(found, convention)
        factors = _factors(found, weights, convention)
        facts = {"scale_convention": convention, "packing": _packing(found)}
    if quantization is not None:
        facts |= {
            "linear_class": quantization.linear_class,
            "quantization_mode": quantization.mode,
            "modules_to_not_convert": quantization.skipped and list(quantization.skipped),
            **quantization.own_norms,
        }
    tied = _tied(found.config, found.model)
    anomalies = _anomalies(found, weights, factors)
    infos = _infos(found, weights, _unread(found, weights, tied, anomalies), factors)
    _check_against_config(found, infos, tied, quantization)
    notes = found.config.notes if found.config else None
    return FloatCheckpoint(
        format=found.detection.format,
        path=path,
        model=found.model,
        infos=infos,
        tied=tied,
        quantization=facts,
        anomalies=anomalies,
        extras=notes.extras if notes else {},
        unread=found.files.unread,
        source=found.files,
        weights=weights,
        factors=factors,
    )


def _model(config: HfConfig | None) -> ModelDescription:
    if config is None:
        return ModelDescription("unknown", {})
    return config.notes.model or config.model


def _config_reason(config: HfConfig | None) -> str:
    if config is None:
        return f"no {CONFIG}"
    stated = config.quantization
    if stated is None:
        return f"{CONFIG} of model type {config.model.family!r}, without quantization_config"
    return (
        f"{CONFIG} of model type {config.model.family!r}: bitnet, {stated.linear_class}, "
        f"{stated.mode}"
    )


def _packing(found: _Found) -> str:
    return "i2-rowblock" if found.detection.format == "hf-packed" else "none"


def _convention(
    path: Path, quantization: Quantization | None, options: ReadOptions
) -> ScaleConvention:
    told = options.scale_convention
    if quantization is None:
        if told is None:
            raise CheckpointError(f"{path}: {_QUESTION}")
        return told
    if quantization.mode == "online":
        raise DamagedCheckpointError(
            f"{path}: config.json says quantization_mode 'online', and codes with a weight_scale "
            "are stored; expected master weights, or 'offline'.",
            path=str(path),
        )
    if told is not None and told != quantization.scale_convention:
        raise CheckpointError(
            f"{path}: --scale-convention {told} contradicts config.json, whose linear_class "
            f"{quantization.linear_class!r} means {quantization.scale_convention}; leave it out, "
            "or mend config.json."
        )
    return quantization.scale_convention


def _coded(found: _Found, convention: ScaleConvention) -> dict[str, StoredWeight]:
    storage = "packed" if found.detection.format == "hf-packed" else "unpacked"
    weights = {}
    for name, stored in found.files.tensors.items():
        packed = stored.dtype == "U8" and name.endswith(".weight")
        if not (packed if storage == "packed" else name + SCALE in found.files.tensors):
            continue
        if len(stored.shape) != 2 or (storage == "unpacked" and stored.dtype not in FLOATS):
            raise _damaged(found, name, f"has {stored.dtype} {list(stored.shape)}; expected codes")
        rows, columns = stored.shape
        if storage == "packed":
            rows = _rows(found, name, rows)
        scale, nbytes = _scale(found, name, convention)
        weights[name] = StoredWeight(
            name, "packed" if storage == "packed" else "unpacked", (rows, columns), scale, nbytes
        )
    return weights


def _rows(found: _Found, name: str, stored: int) -> int:
    noted = found.config.notes.rows.get(name) if found.config else None
    rows = 4 * stored if noted is None else noted
    if -(-rows // 4) != stored:
        raise _damaged(
            found, name, f"has {stored} rows of bytes, and config.json says {rows} rows of codes"
        )
    return rows


def _scale(found: _Found, name: str, convention: ScaleConvention) -> tuple[float, int]:
    key = name + SCALE
    stored = found.files.tensors.get(key)
    if stored is None:
        raise _damaged(found, name, f"is packed and has no {key!r}, without which it has no values")
    if stored.dtype not in FLOATS or stored.shape != (1,):
        raise _damaged(
            found,
            name,
            f"has a scale of {stored.dtype} {list(stored.shape)} in {key!r}; expected one floating "
            "value of shape [1]",
        )
    value = found.files.read(key).float()
    if not (value.isfinite() & (value > 0)).all():
        raise _damaged(
            found, name, f"has scale {float(value)} in {key!r}; expected a positive finite number"
        )
    if convention == "divide":
        value = torch.reciprocal(value)
        if not value.isfinite().all():
            raise _damaged(found, name, f"divides by the value in {key!r}, which gives infinity")
    return float(value), stored.nbytes


def _factors(
    found: _Found, weights: Mapping[str, StoredWeight], convention: ScaleConvention
) -> dict[str, float]:
    """AutoBitLinear computes (Wx + b) * weight_scale: the scale belongs to the bias as well."""
    if convention == "divide":
        return {}
    biases = biases_of(found.files.tensors, weights)
    return {bias: weights[name].scale or 1.0 for name, bias in biases.items()}


def _tied(config: HfConfig | None, model: ModelDescription) -> dict[str, str]:
    if config and config.notes.tied is not None:
        return dict(config.notes.tied)
    if model.family in HF_FAMILIES and model.config.get("tie_word_embeddings"):
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}


def _anomalies(
    found: _Found, weights: Mapping[str, StoredWeight], factors: Mapping[str, float]
) -> list[Anomaly]:
    odd = [
        Anomaly(f"file {name!r} is no part of the model and is not read")
        for name in found.files.unread
        if name.endswith(".safetensors")
    ]
    quantization = found.config.quantization if found.config else None
    if found.model.family in HF_FAMILIES and quantization is not None:
        odd += _odd_head(quantization, stored=_HEAD in weights)
    if quantization is not None and quantization.use_rms_norm:
        odd.append(Anomaly("use_rms_norm: every quantized layer normalises its input by itself"))
    if factors:
        odd.append(
            Anomaly(
                f"{several(len(factors), 'bias', 'biases')} of ternary layers read times "
                "weight_scale, by which AutoBitLinear multiplies them"
            )
        )
    if found.detection.format == "hf-online":
        odd += [
            Anomaly(
                "holds three values only: a master made from codes, or a dense product saved as a "
                "master, whose scale every forward shrinks by the share of codes that are not 0",
                name,
            )
            for name in weights
            if fake_scale(found.files, name) is not None
        ]
    return odd


def _odd_head(quantization: Quantization, *, stored: bool) -> list[Anomaly]:
    """What is odd where transformers and the files differ on whether the head is ternary."""
    if quantization.converts("lm_head", head=True) == stored:
        return []
    what = (
        "holds codes, and transformers spares lm_head unless modules_to_not_convert is a list "
        "without it, so transformers refuses the files"
        if stored
        else "modules_to_not_convert replaces transformers' own list and does not name lm_head, so "
        "transformers makes a BitLinear of it"
    )
    return [Anomaly(what, _HEAD)]


def _unread(
    found: _Found,
    weights: Mapping[str, StoredWeight],
    tied: Mapping[str, str],
    odd: list[Anomaly],
) -> set[str]:
    """Names that are stored and are no tensors of the model; notes why where that is odd."""
    skipped = set()
    for name in found.files.tensors:
        if name.endswith(".weight" + SCALE):
            if name.removesuffix(SCALE) not in weights:
                raise _damaged(found, name, "is the scale of a weight that is stored as no codes")
            skipped.add(name)
        elif name.endswith(_HARMLESS):
            skipped.add(name)
            odd.append(Anomaly("a buffer every reader computes; not read", name))
        elif name in tied and tied[name] in found.files.tensors:
            skipped.add(name)
            _check_copy(found, name, tied[name])
            odd.append(Anomaly(f"stored although it is tied to {tied[name]!r}", name))
    return skipped


def _check_copy(found: _Found, alias: str, name: str) -> None:
    one, two = found.files.tensors[alias], found.files.tensors[name]
    if (one.dtype, one.shape) != (two.dtype, two.shape) or not torch.equal(
        found.files.read(alias), found.files.read(name)
    ):
        raise _damaged(found, alias, f"is tied to {name!r} by config.json and holds other values")


def _infos(
    found: _Found,
    weights: Mapping[str, StoredWeight],
    unread: set[str],
    factors: Mapping[str, float],
) -> dict[str, TensorInfo]:
    infos = {}
    for name, stored in found.files.tensors.items():
        if name in unread:
            continue
        if name not in weights:
            if stored.dtype == "U8" and name.endswith(".weight"):
                raise _damaged(found, name, "is packed and is not expected to be")
            # A product with an fp32 scale needs fp32, whatever the factor is stored in.
            dtype = "F32" if name in factors else stored.dtype
            infos[name] = TensorInfo(name, "plain", stored.shape, dtype, stored.nbytes)
            continue
        weight = weights[name]
        infos[name] = TensorInfo(
            name,
            "ternary",
            weight.shape,
            "i2-rowblock" if weight.storage == "packed" else stored.dtype,
            stored.nbytes + weight.scale_nbytes,
            weight.parts or weight.shape[:1],
            master=weight.storage == "master",
        )
    return infos


def _check_against_config(
    found: _Found,
    infos: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    quantization: Quantization | None,
) -> None:
    shapes = {name: info.shape for name, info in infos.items()}
    if quantization is not None and quantization.use_rms_norm:
        for name in _check_norms(found, infos):
            del shapes[name]
    if problem := check_tensors(found.model, shapes, tied):
        name, what = problem
        _refuse_other_class(found)
        file = found.files.file_of(name) if name in found.files.tensors else found.files.paths[0]
        raise DamagedCheckpointError(
            f"{file}: {what}. Get the files again.", path=str(file), tensor=name
        )
    if found.selection is None and quantization is not None and found.model.family in HF_FAMILIES:
        for info in infos.values():
            _check_kind(found, info, quantization)


def _refuse_other_class(found: _Found) -> None:
    """The tensors of a sequence classifier, or of a model without its head, are other ones."""
    classes = found.model.config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    if isinstance(named, str) and not named.endswith("ForCausalLM"):
        raise CheckpointError(
            f"{found.config.path if found.config else CONFIG} names the class {named!r}; expected "
            "LlamaForCausalLM or BitNetForCausalLM, the ones whose tensors are known: save the "
            "whole language model."
        )


def _check_norms(found: _Found, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the norms that `use_rms_norm` puts into ternary layers, which must be there."""
    names = []
    for info in infos.values():
        if info.kind == "plain":
            continue
        name = info.name.removesuffix("weight") + "rms_norm.weight"
        if name not in infos:
            raise _damaged(found, name, "is missing, and use_rms_norm in config.json calls for it")
        if infos[name].shape != info.shape[1:]:
            raise _damaged(
                found,
                name,
                f"has shape {list(infos[name].shape)}; expected {list(info.shape[1:])}",
            )
        names.append(name)
    return names


def _check_kind(found: _Found, info: TensorInfo, quantization: Quantization) -> None:
    role = role_of(info.name, "hf")
    if role is None or role.kind not in PROJECTIONS or role.suffix != "weight":
        return
    converted = quantization.converts(info.name.removesuffix(".weight"))
    if converted != (info.kind == "ternary"):
        raise _damaged(
            found,
            info.name,
            "holds no codes, and config.json does not exclude it"
            if converted
            else "holds codes, and modules_to_not_convert excludes it",
        )


def _damaged(found: _Found, name: str, what: str) -> DamagedCheckpointError:
    file = found.files.file_of(name) if name in found.files.tensors else found.files.paths[0]
    return DamagedCheckpointError(
        f"{file}: tensor {name!r} {what}. Get the files again.", path=str(file), tensor=name
    )
