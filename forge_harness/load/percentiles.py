"""Percentiles with what is known about them: sample count, exact bounds, and when to say nothing.

Bounds are order statistics: exact for independent requests and free of assumptions on the
distribution. Requests of one run are not quite independent (a stall hits many), so several runs
say more than one long one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forge_harness.scoring.statistics import samples_for_share

if TYPE_CHECKING:
    from hdrh.histogram import HdrHistogram

SHARES = (0.5, 0.9, 0.95, 0.99, 0.999)
CONFIDENCE = 0.99
"""Of each bound by itself. MLPerf certifies percentiles at 0.99 too."""
_HIGHEST_US = 3_600_000_000
_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """A percentile of a sample, in seconds.

    `value` is None with fewer than `needed` samples: the true percentile may then lie above
    everything that was seen. It is infinite when that many requests were never answered.
    """

    share: float
    count: int
    needed: int
    value: float | None
    low: float | None
    """None when the sample is too small to bound it from below."""
    high: float | None

    @property
    def name(self) -> str:
        """For example p99.9."""
        return f"p{100 * self.share:g}"

    @property
    def text(self) -> str:
        """The value in ms with its bounds, or why there is none."""
        if self.value is None:
            return f"too few for {self.name} ({self.count} of {self.needed})"
        return f"{milliseconds(self.value)} [{milliseconds(self.low)}, {milliseconds(self.high)}]"


def percentile(
    ordered: Sequence[float], share: float, confidence: float = CONFIDENCE
) -> Percentile:
    """Returns a percentile (nearest rank) of an ascending sample with exact bounds.

    The lower bound is the highest order statistic that exceeds the percentile with probability at
    most 1 - confidence, the upper the lowest that falls short of it with at most that.

    Args:
        ordered: Ascending, in seconds; infinite for requests without an answer.
        share: Between 0 and 1.
        confidence: Of each bound.
    """
    n = len(ordered)
    needed = samples_for_share(share, confidence)
    if n < needed:
        return Percentile(share=share, count=n, needed=needed, value=None, low=None, high=None)
    below, above = bound_ranks(n, share, confidence)
    return Percentile(
        share=share,
        count=n,
        needed=needed,
        value=ordered[nearest_rank(n, share) - 1],
        low=ordered[below - 1] if below else None,
        high=ordered[above - 1],
    )


def nearest_rank(n: int, share: float) -> int:
    """Returns the rank, from 1, of a percentile of n values: the smallest with rank/n >= share."""
    # 0.95 * 20 is 19.000000000000004 in some orders of rounding; ranks are exact in n.
    return max(1, math.ceil(share * n - 1e-9))


def bound_ranks(n: int, share: float, confidence: float) -> tuple[int, int]:
    """Returns the ranks, from 1, of the order statistics that bound a percentile; 0 for none.

    The r-th smallest of n lies above the percentile with probability P(Bin(n, share) <= r - 1) at
    most, and below it with P(Bin(n, share) >= r) at most.
    """
    from scipy.special import bdtr

    allowed = 1 - confidence

    def at_most(k: int) -> float:
        return float(bdtr(k, n, share)) if k >= 0 else 0.0

    low, high = 0, n
    while low < high:  # Largest r with P(Bin <= r - 1) <= allowed.
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at_most(middle - 1) <= allowed else (low, middle - 1)
    below = low
    low, high = 1, n + 1
    while low < high:  # Smallest r with P(Bin <= r - 1) >= 1 - allowed.
        middle = (low + high) // 2
        low, high = (low, middle) if at_most(middle - 1) >= confidence else (middle + 1, high)
    return below, low if low <= n else 0


def summary(seconds: Iterable[float]) -> tuple[Percentile, ...]:
    """Returns the usual percentiles of a sample."""
    ordered = sorted(seconds)
    return tuple(percentile(ordered, share) for share in SHARES)


def histogram(seconds: Iterable[float]) -> HdrHistogram:
    """Returns an HdrHistogram of finite times, 1 us to 1 h at three digits; merges across runs.

    For exchange. It rounds ranks to the nearest, one too low now and then, so percentiles that are
    judged come from the sample itself.
    """
    from hdrh.histogram import HdrHistogram

    found = HdrHistogram(1, _HIGHEST_US, _DIGITS)
    for value in seconds:
        if math.isfinite(value):
            found.record_value(min(max(round(1e6 * value), 1), _HIGHEST_US))
    return found


def encoded_histogram(seconds: Iterable[float]) -> str:
    """Returns the histogram in HdrHistogram's own V2 encoding, base64."""
    return bytes(histogram(seconds).encode()).decode("ascii")


def milliseconds(seconds: float | None) -> str:
    """Returns a time in ms with three digits; "none" for an answer that never came."""
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "no answer"
    ms = 1000 * seconds
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
