"""The configuration a subject states, and how it resolves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInfo:
    """The quantization a configuration states, to be held against the weights."""

    scale_convention: Literal["multiply", "divide"]
    """Whether the stored scale multiplies codes (absmean) or divides them (1 / absmean)."""
    packing: str
    """Name of the byte layout, for example "i2-rowblock"."""
    granularity: Literal["tensor", "part", "row"]
    excluded: tuple[str, ...]
    """Modules left in full precision."""


@runtime_checkable
class ResolvedConfig(Protocol):
    """A loaded configuration."""

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over values only: formatting, order and origin do not move it."""
        ...

    def values(self) -> Mapping[str, Any]:
        """Dotted key -> JSON value, all keys, defaults included."""
        ...

    def origin(self, key: str) -> Literal["flag", "environment", "file", "default"]:
        """Which layer the value of a dotted key came from."""
        ...

    def to_toml(self) -> str:
        """The configuration as a file that loads back to the same values."""
        ...


@runtime_checkable
class Configures(Protocol):
    """Loads its configuration in layers: flag > environment > file > default."""

    def load_config(
        self,
        *,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> ResolvedConfig:
        """Raises `forge_harness.errors.ConfigError` (or ValueError) for bad input."""
        ...

    def config_schema(self) -> Mapping[str, Any]:
        """JSON Schema of the configuration file."""
        ...

    def quantization_info(self, task: str) -> QuantizationInfo:
        """The quantization the configuration of a task states."""
        ...
