"""What quantization-aware training costs, as a paired ratio: machine and load cancel out."""

import time

import pytest

from forge_harness.scoring.statistics import paired_median_bounds
from forge_harness.subject.protocols import TrainOptions

PAIRS = 16
ERROR = 0.02
"""One-sided error of a bound: ranks 4 and 13 of 16 pairs (exact: 0.0106)."""
SETTINGS = ({}, {"compute": "int8"})
"""`TrainOptions.extra` to try; the cheapest one counts. A subject need not know the second."""


@pytest.mark.forge_check("performance.training_overhead")
def test_training_overhead(subject, policy, evidence):
    """A ternary training step costs at most its stated ratio of a full-precision step.

    Steps of both sessions alternate in one thread, in the task with the largest model, and the
    order within a pair alternates too. The median of the ratios is bounded by order statistics,
    without assumptions on the noise. Process CPU time, so that other processes do not count. The
    check is not measured when the limit lies between the bounds: the machine is too noisy to say.
    """
    task = _largest(subject)
    limit = policy.threshold("training.overhead_ratio.at_most")
    best = None
    for extra in SETTINGS:
        pairs = _timed_pairs(subject, task, extra)
        if pairs is None:
            continue
        interval = paired_median_bounds(*pairs, error=ERROR)
        name = extra.get("compute", "default")
        evidence.record(
            f"ratio_{name}",
            interval.estimate,
            reason=f"{task}, {interval.method}, {interval.low:.3f} to {interval.high:.3f}",
            samples=[one / two for one, two in zip(*pairs, strict=True)],
        )
        if best is None or interval.estimate < best.estimate:
            best = interval
    if best.low <= limit < best.high:
        pytest.skip(
            f"the limit of {limit:g} lies between the bounds {best.low:.3f} and {best.high:.3f}: "
            "measure on a quieter machine"
        )
    evidence.at_most(
        "overhead_ratio",
        best.high,
        limit=limit,
        reason=f"upper bound of the median CPU time ratio, cheapest setting; {best.method}",
    )


def _largest(subject):
    tasks = subject.tasks() if callable(getattr(subject, "tasks", None)) else ()
    if not tasks:
        pytest.skip("the subject does not name its tasks (BuildsModel.tasks)")
    return max(tasks, key=lambda task: subject.model_spec(task).parameters)


def _timed_pairs(subject, task, extra):
    """CPU seconds of (ternary, full-precision) steps, or None when the setting is refused."""
    try:
        ternary = subject.session(task, TrainOptions(steps=PAIRS + 2, extra=extra))
    except Exception:
        # How a foreign subject refuses a setting it does not know is its own affair.
        if extra:
            return None
        raise
    full = subject.session(task, TrainOptions(steps=PAIRS + 2, precision="full"))
    for session in (ternary, full) * 2:
        session.step()
    seconds = {id(ternary): [], id(full): []}
    for pair in range(PAIRS):
        for session in (ternary, full) if pair % 2 else (full, ternary):
            start = time.process_time()
            session.step()
            seconds[id(session)].append(time.process_time() - start)
    return seconds[id(ternary)], seconds[id(full)]
