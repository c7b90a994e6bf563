"""The trend as pictures, written by hand; colours come from the style sheet.

The plot is stretched to the width of the page, so that its text is not in it but beside it, in the
size of all text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from forge_harness.report.model import Trend, TrendFigure, TrendPoint
from forge_harness.report.svg import share_below
from forge_harness.report.text import number, percent

_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_EDGE = 120, 24, 3


def trend_plot(trend: Trend) -> Markup:
    """Returns score interval and coverage over the runs; lines end where runs do not compare."""
    points = trend.points
    parts = [Markup('<path class="trend-grid" d="M0 0H100M0 20H100M0 50H100M0 100H100"/>')]
    for place, point in enumerate(points):
        if point.breaks:
            at = _number(100 * place / len(points))
            parts.append(Markup('<path class="trend-break" d="M{0} 0V100"/>').format(at))
    for segment in segments([bool(point.breaks) for point in points]):
        parts += _segment(points, segment)
    return Markup(
        '<svg class="trend-plot" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        'aria-labelledby="trend-title trend-desc"><title id="trend-title">{title}</title>'
        '<desc id="trend-desc">{desc}</desc>{parts}</svg>'
    ).format(title=_TITLE, desc=_described(points), parts=Markup().join(parts))


def figure_line(figure: TrendFigure, breaks: Sequence[bool]) -> Markup:
    """Returns the course of a gate's value, with a gap where runs do not compare or it is missing.

    Args:
        figure: The values.
        breaks: For each run whether it does not compare with the one before.
    """
    known = [value for value in figure.values if value is not None]
    low, high = min(known), max(known)
    step = _SPARK_WIDTH / len(figure.values)

    def at(place: int) -> str:
        value = figure.values[place]
        assert value is not None
        share = share_below(value, low, high)
        y = _SPARK_EDGE + share * (_SPARK_HEIGHT - 2 * _SPARK_EDGE)
        return f"{_number(step * (place + 0.5))} {_number(y)}"

    missing = [value is None for value in figure.values]
    lines = [
        f"M{'L'.join(at(place) for place in run)}"
        for segment in segments(breaks)
        for run in _present(segment, missing)
    ]
    dots = [f"M{at(place)}h0" for place, gone in enumerate(missing) if not gone]
    return Markup(
        '<svg class="spark" viewBox="0 0 120 24" role="img" aria-label="{label}">'
        '<path class="spark-line" d="{lines}"/><path class="spark-dots" d="{dots}"/></svg>'
    ).format(label=_course(figure, breaks), lines="".join(lines), dots="".join(dots))


def segments(breaks: Sequence[bool]) -> Iterator[range]:
    """Yields the runs of runs that compare, each with the one before."""
    starts = [place for place, broken in enumerate(breaks) if broken or place == 0]
    for start, end in zip(starts, [*starts[1:], len(breaks)], strict=True):
        yield range(start, end)


def _present(segment: range, missing: Sequence[bool]) -> Iterator[list[int]]:
    kept: list[int] = []
    for place in segment:
        if missing[place]:
            if kept:
                yield kept
            kept = []
        else:
            kept.append(place)
    if kept:
        yield kept


_TITLE = "Score and coverage of the kept runs"


def _segment(points: Sequence[TrendPoint], segment: range) -> list[Markup]:
    def line(heights: Sequence[float], places: Sequence[int]) -> str:
        xs = [100 * (place + 0.5) / len(points) for place in places]
        pairs = zip(xs, heights, strict=True)
        return "L".join(f"{_number(x)} {_number(100 - height)}" for x, height in pairs)

    lows = [points[place].low for place in segment]
    highs = [points[place].high for place in segment]
    there, back = list(segment), list(reversed(segment))
    area = f"M{line(highs, there)}L{line(lows[::-1], back)}Z"
    measured = line([100 * points[place].measured for place in segment], there)
    low = line(lows, there)
    # A line without length is a dot under round caps, round however the picture is stretched.
    dots = "".join(
        f"M{line([height], [place])}h0" for height, place in zip(lows, segment, strict=True)
    )
    spans = "".join(
        f"M{line([a, b], [place, place])}" for a, b, place in zip(lows, highs, segment, strict=True)
    )
    shapes = (
        ("trend-area", area),
        ("trend-span", spans),
        ("trend-measured", f"M{measured}"),
        ("trend-low", f"M{low}"),
        ("trend-dots", dots),
    )
    return [Markup('<path class="{0}" d="{1}"/>').format(name, d) for name, d in shapes]


def _described(points: Sequence[TrendPoint]) -> str:
    first, last = points[0], points[-1]
    broken = sum(bool(point.breaks) for point in points)
    breaks = "no break" if not broken else f"{broken} break{'s' if broken > 1 else ''}"
    return (
        f"{len(points)} runs, {breaks}. Low score from {first.low} to {last.low}, highest possible "
        f"from {first.high} to {last.high}, measured from {percent(first.measured)} % to "
        f"{percent(last.measured)} %. The table below has the numbers."
    )


def _course(figure: TrendFigure, breaks: Sequence[bool]) -> str:
    known = [value for value in figure.values if value is not None]
    words = f"{figure.name}: from {number(known[0])} to {number(known[-1])}"
    words += f", between {number(min(known))} and {number(max(known))}"
    if any(breaks):
        words += ", of runs that do not all compare"
    return words if figure.values[-1] is not None else f"{words}; not measured in this run"


def _number(value: float) -> str:
    return f"{value:.6g}"
