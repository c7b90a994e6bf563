"""Full-precision weights: which of them become ternary on import, and how each is stored.

A state dict does not say which matrix is a linear layer. For Llama and BitNet configurations it is
known; otherwise a rule on names chooses, says what it chose, and yields to the user's patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from forge_harness.errors import CheckpointError

from .architecture import HF_FAMILIES, PROJECTIONS, role_of
from .checkpoint import ReadOptions
from .hf_config import Quantization
from .hf_files import TensorSource
from .weights import StoredWeight, fake_scale

FLOATS = ("F64", "F32", "F16", "BF16")
_SPARED = re.compile(r"embed|wte|wpe|lm_head|norm|(?:^|[._])emb|emb(?:[._]|$)")
"""In a name of an unknown family: embeddings, output heads and norms stay as they are."""
_SPARED_MODULES = ("head", "output", "classifier", "score")
"""The whole last part of a module's name: output layers."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which floating matrices are ternary in forward.

    Attributes:
        ternary: Names.
        spared: The other floating matrices.
        rule: Why, one clause.
    """

    ternary: tuple[str, ...]
    spared: tuple[str, ...]
    rule: str


def select(
    source: TensorSource, family: str, quantization: Quantization | None, options: ReadOptions
) -> Selection:
    """Chooses the matrices that become ternary.

    Args:
        source: The tensors.
        family: Model family.
        quantization: Of config.json, whose `modules_to_not_convert` is honoured.
        options: `quantize` and `exclude` win over everything.

    Raises:
        CheckpointError: A pattern matches no floating matrix, or nothing is left to quantize.
    """
    matrices = [
        name
        for name, stored in source.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in FLOATS
    ]
    _require_matches((*(options.quantize or ()), *options.exclude), matrices)
    if options.quantize is not None:
        chosen = [name for name in matrices if _matches_any(name, options.quantize)]
        rule = f"you named {', '.join(options.quantize)}"
    elif family in HF_FAMILIES:
        chosen = [name for name in matrices if _is_ternary(name, quantization)]
        rule = f"the projections of a {family} model"
    elif family == "digits":
        chosen, rule = matrices, "every matrix of a digits model"
    else:
        chosen = [name for name in matrices if not _looks_spared(name)]
        rule = "every matrix whose name is not that of an embedding, an output head or a norm"
    ternary = [name for name in chosen if not _matches_any(name, options.exclude)]
    spared = [name for name in matrices if name not in set(ternary)]
    return Selection(tuple(ternary), tuple(spared), rule)


def masters(source: TensorSource, names: Iterable[str]) -> dict[str, StoredWeight]:
    """Returns the matrices as masters, whatever their values: they are quantized when used."""
    shapes = {name: source.tensors[name].shape for name in names}
    return {name: StoredWeight(name, "master", (s[0], s[1])) for name, s in shapes.items()}


def stored_weights(source: TensorSource, names: Iterable[str]) -> dict[str, StoredWeight]:
    """Says for each floating matrix whether it is a dense product of codes and scale, or a master.

    A dense product gives back its codes and scale exactly; quantizing it again would shrink the
    scale by the share of codes that are not 0.
    """
    found = {}
    for name in names:
        rows, columns = source.tensors[name].shape
        scale = fake_scale(source, name)
        found[name] = (
            StoredWeight(name, "master", (rows, columns))
            if scale is None
            else StoredWeight(name, "fake", (rows, columns), scale)
        )
    return found


def _is_ternary(name: str, quantization: Quantization | None) -> bool:
    role, module = role_of(name, "hf"), name.removesuffix(".weight")
    if role is None:
        return False
    if role.kind == "head":
        # Full precision that names no quantization keeps its head, as BitNet models do.
        return quantization is not None and quantization.converts(module, head=True)
    return role.kind in PROJECTIONS and (quantization is None or quantization.converts(module))


def _looks_spared(name: str) -> bool:
    module = name.removesuffix(".weight").lower()
    return bool(_SPARED.search(module)) or module.rpartition(".")[2] in _SPARED_MODULES


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    return any(fnmatchcase(name, p) or fnmatchcase(module, p) for p in patterns)


def _require_matches(patterns: Sequence[str], matrices: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches_any(name, (pattern,)) for name in matrices):
            raise CheckpointError(
                f"Pattern {pattern!r} matches no floating matrix; there are "
                f"{', '.join(matrices[:6]) or 'none'}{', ...' if len(matrices) > 6 else ''}."
            )
