"""Plots: what a line alone would not show."""

from __future__ import annotations

import math

import pytest

from forge_harness.report.figures import SERIES, figure, plot_line

GAP = math.nan


@pytest.mark.parametrize(
    ("ys", "dots"),
    [
        ([1.0], 1),
        ([1.0, GAP, 2.0], 2),
        ([GAP, 1.0, GAP, 2.0, 3.0], 1),
        ([1.0, 2.0, 3.0], 0),
        ([GAP, GAP], 0),
    ],
)
def test_a_point_between_two_gaps_is_seen(ys, dots):
    xs = [float(x) for x in range(len(ys))]
    svg = figure(
        lambda axes: plot_line(axes, xs, ys, color=SERIES[0]),
        prefix="p",
        title="t",
        description="d",
    )
    drawn = [use for use in svg.split("<use ")[1:] if "var(--series-1)" in use.partition(">")[0]]
    assert len(drawn) == dots
