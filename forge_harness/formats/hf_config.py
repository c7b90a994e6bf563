"""config.json of a Hugging Face directory: the model, how it is quantized, and our own notes.

Meaning and defaults of `quantization_config` are those of transformers' `BitNetQuantConfig` and
`quantizers/quantizers_utils.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_harness.errors import CheckpointError, DamagedCheckpointError, unknown_choice

from .checkpoint import ModelDescription, ScaleConvention
from .hf_files import CONFIG, inside
from .strict_json import read_object

LINEAR_CLASSES = ("bitlinear", "autobitlinear")
MODES = ("offline", "online")
OWN_NORMS = ("use_rms_norm", "rms_norm_eps")
"""Keys of norms in every ternary layer, carried from reader to writer."""
NOTES = "forge_harness"
"""The one key of config.json under which this package records what the format has no place for."""
_PATTERN = re.compile(r"[\w.*\\$^-]*")


@dataclass(frozen=True, slots=True)
class Quantization:
    """`quantization_config`, defaults filled in.

    Attributes:
        linear_class: "bitlinear" (weight_scale divides) or "autobitlinear" (it multiplies).
        mode: "offline" (codes and scales are stored) or "online" (masters are).
        skipped: `modules_to_not_convert`; None: transformers' own list. A list *replaces* that.
        use_rms_norm: Whether every quantized layer normalises its input with `<name>.rms_norm`.
        rms_norm_eps: Of that norm.
    """

    linear_class: str = "bitlinear"
    mode: str = "offline"
    skipped: tuple[str, ...] | None = None
    use_rms_norm: bool = False
    rms_norm_eps: float = 1e-6

    @property
    def scale_convention(self) -> ScaleConvention:
        """What the stored `weight_scale` does."""
        return "divide" if self.linear_class == "bitlinear" else "multiply"

    @property
    def own_norms(self) -> dict[str, Any]:
        """The two keys of norms in the layers; {} where they have none."""
        if not self.use_rms_norm:
            return {}
        return dict(zip(OWN_NORMS, (True, self.rms_norm_eps), strict=True))

    def converts(self, module: str, *, head: bool = False) -> bool:
        """Whether transformers quantizes a linear module.

        Args:
            module: Full path, without ".weight".
            head: Whether it is the output embedding, which transformers' own list spares.
        """
        if self.skipped is None:
            return not head
        return not any(_matches(pattern, module) for pattern in self.skipped)


@dataclass(frozen=True, slots=True)
class Notes:
    """What this package wrote under `NOTES`.

    Attributes:
        model: Family and config of a model transformers cannot run; None: those of config.json.
        rows: Stored tensor name -> N, where N is no multiple of 4.
        tied: Alias -> stored name, in the original spelling; None: not recorded.
        extras: Further JSON of the original.
    """

    model: ModelDescription | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the value of the key `NOTES`; {} when there is nothing to note."""
        found: dict[str, Any] = {}
        if self.model is not None:
            found |= {"family": self.model.family, "config": dict(self.model.config)}
        optional = {"rows": self.rows, "extras": self.extras}
        found |= {key: dict(value) for key, value in optional.items() if value}
        if self.tied is not None:
            found["tied"] = dict(self.tied)
        return found


@dataclass(frozen=True, slots=True)
class HfConfig:
    """config.json, split into its three subjects.

    Attributes:
        path: The file.
        model: `model_type` ("unknown" when absent) and all other keys.
        quantization: None when the file has no `quantization_config`.
        notes: Of this package.
    """

    path: Path
    model: ModelDescription
    quantization: Quantization | None
    notes: Notes


def find_config(path: Path) -> HfConfig | None:
    """Reads the config.json of a directory, or the one beside a file; None when there is none.

    Raises:
        CheckpointError: The model is quantized by another method.
        DamagedCheckpointError: It is not JSON, has a key twice, or a value that is not allowed.
    """
    directory = path if path.is_dir() else path.parent
    file = directory / CONFIG
    if not file.exists() and not file.is_symlink():
        return None
    raw = read_object(inside(directory, CONFIG, CONFIG))
    described = {k: v for k, v in raw.items() if k not in ("quantization_config", NOTES)}
    family = described.get("model_type", "unknown")
    if not isinstance(family, str) or not family:
        raise _refused(file, "model_type", family, "the name of a model family")
    section = raw.get("quantization_config")
    return HfConfig(
        file,
        ModelDescription(family, described),
        None if section is None else _quantization(file, section),
        _notes(file, raw.get(NOTES, {})),
    )


def _quantization(file: Path, section: object) -> Quantization:
    if not isinstance(section, dict):
        raise _refused(file, "quantization_config", section, "an object")
    method = section.get("quant_method")
    if method != "bitnet":
        raise CheckpointError(
            f"{file}: quantization_config.quant_method is {method!r}; expected 'bitnet': weights "
            "of another method are no ternary codes."
        )
    found = Quantization(
        linear_class=_choice(file, section, "linear_class", LINEAR_CLASSES, "bitlinear"),
        mode=_choice(file, section, "quantization_mode", MODES, "offline"),
        skipped=_skipped(file, section.get("modules_to_not_convert")),
        use_rms_norm=section.get("use_rms_norm", False),
        rms_norm_eps=_eps(file, section.get("rms_norm_eps")),
    )
    if type(found.use_rms_norm) is not bool:
        raise _refused(
            file, "quantization_config.use_rms_norm", found.use_rms_norm, "true or false"
        )
    return found


def _choice(
    file: Path, section: Mapping[str, Any], key: str, valid: tuple[str, ...], default: str
) -> str:
    value = section.get(key, default)
    if value not in valid:
        raise DamagedCheckpointError(
            f"{file}: {unknown_choice(f'quantization_config.{key}', str(value), valid)}",
            path=str(file),
        )
    return str(value)


def _skipped(file: Path, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    key = "quantization_config.modules_to_not_convert"
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise _refused(file, key, value, "null or a list of module names")
    for pattern in value:
        # transformers reads them as regular expressions, whose worst cases take for ever.
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 3:
            raise _refused(file, key, pattern, "a module name, in which '.*' stands for anything")
        try:
            re.compile(pattern)
        except re.error as error:
            raise _refused(file, key, pattern, f"a pattern that compiles ({error})") from error
    return tuple(value)


def _eps(file: Path, value: object) -> float:
    if value is None:
        return 1e-6
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _refused(file, "quantization_config.rms_norm_eps", value, "a positive number")
    return float(value)


def _matches(pattern: str, module: str) -> bool:
    """`should_convert_module` of transformers: from the start up to a dot, or as a suffix."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return bool(re.match(rf"(?:{pattern}){boundary}", module)) or module.endswith(pattern)


def _notes(file: Path, found: object) -> Notes:
    if not isinstance(found, dict):
        raise _refused(file, NOTES, found, "an object")
    family, config = found.get("family"), found.get("config", {})
    model = None
    if family is not None:
        if not isinstance(family, str) or not isinstance(config, dict):
            raise _refused(file, f"{NOTES}.family", family, "a name, with an object as config")
        model = ModelDescription(family, config)
    tied = None if "tied" not in found else _map_of(file, found, "tied", _is_name)
    extras = found.get("extras", {})
    if not isinstance(extras, dict):
        raise _refused(file, f"{NOTES}.extras", extras, "an object")
    return Notes(
        model=model,
        rows=_map_of(file, found, "rows", _is_count),
        tied=tied,
        extras=extras,
    )


def _map_of(file: Path, notes: Mapping[str, Any], key: str, valid: Any) -> dict[str, Any]:  # noqa: ANN401 - a predicate
    found = notes.get(key, {})
    if not isinstance(found, dict) or not all(valid(value) for value in found.values()):
        raise _refused(file, f"{NOTES}.{key}", found, "an object as this package writes it")
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _refused(file: Path, key: str, value: object, expected: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{file}: {key} is {value!r:.120}; expected {expected}.", path=str(file)
    )
