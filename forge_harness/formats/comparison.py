"""Whether two checkpoints hold the same model, whatever their formats and spellings of names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .architecture import one_spelling
from .checkpoint import Checkpoint
from .digests import packed_sha256, values_sha256
from .tensors import TernaryTensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a conversion changed, read back from what was written.

    Attributes:
        ternary: Tensors compared, fused ones part by part.
        ternary_weights: Weights in them.
        codes_changed: Tensors whose codes are others under their name, or have no equal on the
            other side where that has no such name.
        scale_change: Largest relative change of a scale, of tensors with a code that is not 0.
        plain_changed: Other tensors whose values are others, in the same sense.
    """

    ternary: int
    ternary_weights: int
    codes_changed: int
    scale_change: float
    plain_changed: int


def compared(source: Checkpoint, result: Checkpoint) -> Comparison:
    """Compares codes, scales and values of two checkpoints, name by name.

    Names are brought to one spelling first; what one side only has is compared by its content.
    """
    # Side by side: most of it is hashing, which leaves the interpreter alone.
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(_codes_and_scales, (source, result))
    named = [(before.pop(name), after.pop(name)) for name in before.keys() & after.keys()]
    pairs = [(one[1], two[1]) for one, two in named if one[0] == two[0]]
    loose, gone, new = _paired_by_codes(before.values(), after.values())
    return Comparison(
        ternary=len(named) + len(before),
        ternary_weights=sum(
            info.shape[0] * info.shape[1] for info in source.infos.values() if info.parts
        ),
        codes_changed=len(named) - len(pairs) + max(gone, new),
        scale_change=max((_change(*pair) for pair in (*pairs, *loose)), default=0.0),
        plain_changed=_changed(_plain_digests(source), _plain_digests(result)),
    )


def _codes_and_scales(checkpoint: Checkpoint) -> dict[str, tuple[str, float]]:
    """Returns name -> digest of the codes and scale, of each part of a ternary tensor."""
    found = {}
    for name in checkpoint.ternary_names():
        parts = checkpoint.ternary(name).split()
        names = one_spelling(name, checkpoint.model.family, len(parts))
        for own, part in zip(names, parts, strict=True):
            scale = 0.0 if _is_zero(part) else float(part.scales[0])
            found[own] = (f"{part.shape} {packed_sha256(part)}", scale)
    return found


def _is_zero(part: TernaryTensor) -> bool:
    """Whether all codes are 0, which any scale multiplies alike; most first rows say no."""
    first = part.codes(0, min(1, part.rows))
    return not (first.any() or any(part.codes(*rows).any() for rows in part.chunks()))


def _paired_by_codes(
    before: Iterable[tuple[str, float]], after: Iterable[tuple[str, float]]
) -> tuple[list[tuple[float, float]], int, int]:
    """Returns the scales of equal codes in pairs, and how many on either side have no equal."""
    sides: list[defaultdict[str, list[float]]] = []
    for side in (before, after):
        sides.append(defaultdict(list))
        for digest, scale in side:
            sides[-1][digest].append(scale)
    one, two = sides
    pairs: list[tuple[float, float]] = []
    for digest in one.keys() | two.keys():
        pairs += zip(sorted(one[digest]), sorted(two[digest]), strict=False)
    counts = (sum(map(len, side.values())) - len(pairs) for side in sides)
    return pairs, next(counts), next(counts)


def _change(one: float, two: float) -> float:
    return abs(two - one) / abs(one) if one else abs(two)


def _plain_digests(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        one_spelling(name, checkpoint.model.family, 1)[0]: values_sha256(checkpoint.plain(name))
        for name in checkpoint.plain_names()
    }


def _changed(before: dict[str, str], after: dict[str, str]) -> int:
    others = sum(before[name] != after[name] for name in before.keys() & after.keys())
    gone = Counter(before[name] for name in before.keys() - after.keys())
    new = Counter(after[name] for name in after.keys() - before.keys())
    return others + max((gone - new).total(), (new - gone).total())
