"""Score intervals and sparklines, written by hand; colours come from the style sheet."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_POINTS = 120, 24, 60


def interval_bar(low: int, high: int, name: str) -> Markup:
    """Returns a bar from 0 to 100: solid up to `low`, hatched on to `high`, a tick at 50 and 80."""
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        'aria-label="{name}: {low}, at most {high}, of 100">'
        '<rect class="bar-track" width="100" height="8"/>'
        '<rect class="bar-open" x="{low}" width="{open}" height="8"/>'
        '<rect class="bar-low" width="{low}" height="8"/>'
        '<path class="bar-tick" d="M50 0V8M80 0V8"/></svg>'
    ).format(name=name, low=low, high=high, open=max(high - low, 0))


def sparkline(values: Sequence[float], label: str) -> Markup:
    """Returns the course of a series; longer ones are thinned to 60 points, extremes kept."""
    points = thinned(values, _SPARK_POINTS)
    low, high = min(points), max(points)
    step = _SPARK_WIDTH / max(len(points) - 1, 1)
    xy = [
        (i * step, 2 + share_below(v, low, high) * (_SPARK_HEIGHT - 4))
        for i, v in enumerate(points)
    ]
    path = " ".join(
        f"{x:.4g},{y:.3g}" for x, y in (xy if len(xy) > 1 else [*xy, (120.0, xy[0][1])])
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 120 24" role="img" aria-label="{label}">'
        '<polyline points="{path}"/></svg>'
    ).format(label=label, path=path)


def share_below(value: float, low: float, high: float) -> float:
    """Returns how far a value is below `high`, as a share of the way to `low`; half of no way."""
    # Halved before they are subtracted: no overflow, whatever a record has.
    span = high / 2 - low / 2
    return (high / 2 - value / 2) / span if span else 0.5


def thinned(values: Sequence[float], most: int) -> list[float]:
    """Returns at most `most` values: lowest and highest of each stretch, in their order."""
    if len(values) <= most:
        return list(values)
    kept: list[float] = []
    stretches = most // 2
    for index in range(stretches):
        part = values[index * len(values) // stretches : (index + 1) * len(values) // stretches]
        low, high = min(part), max(part)
        kept += [low, high] if part.index(low) <= part.index(high) else [high, low]
    return kept
