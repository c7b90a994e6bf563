"""The commented forge.toml that `forge-harness init` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_harness._config.schema import DECLARED_DOCS, HarnessConfig, default_values
from forge_harness._config.toml import Entry, commented_section

_HEADER = """\
# Configuration of Forge Harness. Every key is shown with its default, commented out.
# `forge-harness config show --origin` prints what is in force and where it came from.

"""
_ABOUT = {
    "run": "What `forge-harness run` validates, and how.",
    "train": "The training run of `forge-harness train`.",
    "model": "The model `forge-harness train` builds.",
    "paths": "Where the harness keeps its files.",
}


def commented_toml(values: Mapping[str, Any] | None = None) -> str:
    """Returns a forge.toml with every key and its docs, commented out except those of `values`.

    Args:
        values: Dotted key -> value to set; None changes nothing.
    """
    chosen = values or {}
    blocks = []
    for section, field in HarnessConfig.model_fields.items():
        described = getattr(field.annotation, "model_fields", {})
        entries = []
        for key, default in default_values().items():
            owner, _, name = key.partition(".")
            if owner == section:
                text = getattr(described.get(name), "description", "") or DECLARED_DOCS[name]
                entries.append(Entry(name, chosen.get(key, default), text, key in chosen))
        blocks.append(
            commented_section(section, _ABOUT.get(section) or str(field.description), entries)
        )
    return _HEADER + "\n".join(blocks)
