"""The commented forge.toml that `forge-harness init` writes."""

from __future__ import annotations

from forge_harness._config.schema import HarnessConfig, default_values
from forge_harness._config.toml import commented_section

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


def commented_toml() -> str:
    """Returns a forge.toml that changes nothing: every key commented out, with its docs."""
    blocks = []
    for section, field in HarnessConfig.model_fields.items():
        described = getattr(field.annotation, "model_fields", {})
        entries = []
        for key, default in default_values().items():
            owner, _, name = key.partition(".")
            if owner == section:
                entries.append((name, default, getattr(described.get(name), "description", "")))
        blocks.append(
            commented_section(section, _ABOUT.get(section) or str(field.description), entries)
        )
    return _HEADER + "\n".join(blocks)
