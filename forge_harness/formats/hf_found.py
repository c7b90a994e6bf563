"""What safetensors files are, by a look at headers, config.json and the start of some tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge_harness.errors import DamagedCheckpointError, several

from .architecture import HF_FAMILIES
from .checkpoint import Detection, ModelDescription, ReadOptions
from .hf_config import HfConfig, find_config
from .hf_files import CONFIG, TensorFiles, open_files
from .legacy import Selection, masters, select, stored_weights
from .weights import StoredWeight

SCALE = "_scale"
"""What follows the name of a weight in the name of its scale."""
QUESTION = (
    "Whether weight_scale multiplies the codes (autobitlinear) or divides them (bitlinear) stands "
    "in config.json only, and there is none that says; tell with --scale-convention multiply or "
    "divide."
)


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at headers, config.json and the start of some tensors tells."""

    detection: Detection
    files: TensorFiles
    config: HfConfig | None
    model: ModelDescription
    selection: Selection | None
    weights: Mapping[str, StoredWeight]


def look(path: Path, options: ReadOptions) -> Found:
    """Opens the files and tells what they are; whoever gets the result closes them.

    Raises:
        CheckpointError: Which files make up the model, or what becomes ternary, cannot be told.
        DamagedCheckpointError: Header, index or config.json is broken, or they contradict.
    """
    config = find_config(path)
    files = open_files(path)
    try:
        return _classified(path, files, config, options)
    except BaseException:
        files.close()
        raise


def _classified(
    path: Path, files: TensorFiles, config: HfConfig | None, options: ReadOptions
) -> Found:
    model = _model(config)
    for alias, name in tied_names(config, model).items():
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
    return Found(Detection(kind, tuple(reasons)), files, config, model, selection, weights)


def _stored_codes(
    files: TensorFiles,
    config: HfConfig | None,
    model: ModelDescription,
    packed: list[str],
    scaled: list[str],
    reasons: list[str],
) -> Found:
    kind = "hf-packed" if packed else "hf-unpacked"
    names = packed or scaled
    reasons.append(
        f"{several(len(names), 'weight')} of {'packed codes (U8)' if packed else 'float codes'} "
        "with a weight_scale each"
    )
    known = config is not None and config.quantization is not None
    questions = () if known else (QUESTION,)
    detection = Detection(kind, tuple(reasons), questions=questions)
    return Found(detection, files, config, model, None, {})


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


def tied_names(config: HfConfig | None, model: ModelDescription) -> dict[str, str]:
    """Returns tensors that are another one: tied name -> the name it is stored under."""
    if config and config.notes.tied is not None:
        return dict(config.notes.tied)
    if model.family in HF_FAMILIES and model.config.get("tie_word_embeddings"):
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}


def damaged(found: Found, name: str, what: str) -> DamagedCheckpointError:
    """Returns the error that says, of a tensor and its file, what is wrong with it."""
    file = found.files.file_of(name) if name in found.files.tensors else found.files.paths[0]
    return DamagedCheckpointError(
        f"{file}: tensor {name!r} {what}. Get the files again.", path=str(file), tensor=name
    )
