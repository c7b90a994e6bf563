"""Whether training learns: a batch by heart, to a loss in its band, how often and how fast."""

import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import asdict

import pytest

from forge_harness.errors import several
from forge_harness.evidence import largest, smallest
from forge_harness.paths import fixtures_dir
from forge_harness.scoring.statistics import clopper_pearson
from forge_harness.subject.arms import one_arm
from forge_harness.subject.protocols import ExportsWeights, LoadsData, TrainOptions
from forge_harness.subject.study import unpacked

from .augmented import drawn_anew
from .by_heart import (
    LEARNED_ANEW,
    LEARNED_BY_HEART,
    STEPS,
    TAIL,
    Learned,
    is_learned,
    learned_at,
    left,
    samples_of_targets,
)
from .objective import descends_loss, least_loss, objective
from .outputs import right_answers
from .support import only_cheapest, steps

BAND_SEEDS = 6
BAND_STEPS = 46
"""Two epochs of the digits."""
BAND_TAIL = 12
"""Last steps whose losses are averaged: a quarter of the run."""
GENERIC_RATIO = (0.5, 4.0)
"""Band of ternary over full-precision training loss for a subject without a golden band. Far below
its twin, a ternary model sees what it should not; reference tasks lie between 1.0 and 2.1."""
LEARNED = 0.05
"""Share of the first loss, or of that of guessing where it is less, below which two losses count as
equal without a golden band: both models have the task, and the ratio of what is left (0.05 to 0.01
nats) says nothing of either. A first loss alone may be any number: that of an output layer drawn
too wide is far above what a model has that learned nothing."""
LEAST_LEARNED = 0.1
"""Share of what full precision learned in a short run that a ternary model must have learned
without a golden band; reference tasks lie near 0.9, a model that stands still at 0."""
MEASURED_AGAIN = 3
"""Runs a task whose package is evaluated again: 1.3 s each for the language model."""
ACCURACY_TOLERANCE = 2e-4
"""That of training.eval_is_quantized, which has where it comes from."""
CONVERGED = 0.95
"""Share of full-precision accuracy that counts as converged, and as quality reached."""


@pytest.mark.forge_check("training.overfit_one_batch")
def test_overfit_one_batch(subject, evidence):
    """Sixteen samples, or two of many targets, can be learned by heart in 60 steps.

    Oracle: the loss falls to a twentieth of its start, above the least that the subject's loss can
    be for these targets (0, but where labels are smoothed). A lost estimator, frozen layers or
    shuffled labels stay above half; the reference is below a thousandth. A rate made for long runs
    may be too low for 60 steps: then the lowest of 1, 3, 10 and 30 times it counts at which the
    full-precision twin learns them, or the next, as ternary training needs more; where it learns
    them at none, 240 steps are taken. What a session descends that is not `BuildsModel.loss` has no
    known least value: then every answer must be right. Samples that are augmented at random have
    240 steps where 60 are too few, and a fifth may be left of their loss; where full precision does
    not learn them either, or not every answer is right, nothing is known.
    """
    task = only_cheapest(subject, evidence)
    ids = samples_of_targets(subject, task)
    options = TrainOptions(steps=STEPS, fixed_batch=ids)
    session = subject.session(task, options)
    records = steps(session, STEPS)
    evidence.equal(
        "other_samples",
        sum(sorted(record.sample_ids) != sorted(ids) for record in records),
        expected=0,
        unit="steps",
        reason="every step uses the batch that was asked for",
    )
    drawn = isinstance(subject, LoadsData) and drawn_anew(subject, task, ids)[0]
    if not descends_loss(subject, task, options):
        right = right_answers(subject, session, task, ids)
        if math.isnan(right):
            pytest.skip(
                f"the session descends another loss than the subject's, and which answers the "
                f"model of {task} gives does not show in its outputs: return a logit a class"
            )
        if drawn and right < 1.0:
            pytest.skip(
                f"training samples of {task} are drawn anew with each read (augmentation, "
                "masking), and the session descends another loss than the subject's: how far "
                f"that can fall is not known, and {right:.0%} of the answers are right"
            )
        evidence.at_least(
            "right_answers",
            right,
            limit=1.0,
            reason="share of the batch; the session descends another loss than the subject's, "
            f"whose last over first is {records[-1].loss / records[0].loss:.3g}",
        )
        return
    least = least_loss(subject, task, ids)
    run = Learned(STEPS, 1, [record.loss - least for record in records], by_twin=True)
    if not is_learned(run.losses, drawn=drawn):
        run = learned_at(subject, task, options, least, drawn=drawn)
    if drawn and not run.by_twin:
        pytest.skip(
            f"training samples of {task} are drawn anew with each read (augmentation, masking), "
            f"and full precision does not learn {several(len(ids), 'sample')} by heart either"
        )
    evidence.at_most(
        "loss_ratio",
        left(run.losses, drawn=drawn),
        limit=LEARNED_ANEW if drawn else LEARNED_BY_HEART,
        reason=f"{f'mean of the last {TAIL}' if drawn else 'last'} over first loss of "
        f"{several(len(ids), 'sample')}, above the least there is, {least:.3g}, in {run.steps} "
        f"steps at {run.multiple} times the recipe's rate"
        + ("; samples are drawn anew with each read" if drawn else ""),
        samples=[loss for loss in run.losses if math.isfinite(loss)],
    )


@pytest.mark.forge_check("training.loss_within_band")
def test_loss_within_band(subject, evidence):
    """The training loss of a short run is neither higher nor lower than it should be.

    Oracle: `fixtures/training/loss_bands.json`, made from 24 seeds of the reference by the script
    beside it: the band of a mean of six seeds with a false-alarm rate of 1e-4. It applies to
    subjects with the same data, size, schedule and objective; others are held to a wide band of
    ternary over full precision, same seeds, where losses are not both next to nothing, and to
    learning at all where their twin does. Two-sided, because a lost estimator or a leak makes the
    loss fall.
    """
    task = only_cheapest(subject, evidence)
    ternary, full = (
        [_ends(subject, task, seed, precision) for seed in range(BAND_SEEDS)]
        for precision in ("ternary", "full")
    )
    band = _golden_band(subject, task)
    if problem := one_arm([tail for _, tail in ternary], [tail for _, tail in full]):
        pytest.skip(problem)
    guessing = _loss_of_guessing(subject, task) if band is None else 0.0
    known = min(statistics.fmean(first for first, _ in full), guessing)
    floor = LEARNED * known
    logs = [[_log(largest((tail, floor))) for _, tail in arm] for arm in (ternary, full)]
    ratios = [one - two for one, two in zip(*logs, strict=True)]
    if band is not None:
        low, high = band["loss"]
        evidence.within(
            "loss",
            math.exp(statistics.fmean(logs[0])),
            low=low,
            high=high,
            unit="nats",
            reason=f"last {BAND_TAIL} of {BAND_STEPS} steps, geometric mean of {BAND_SEEDS} seeds",
            samples=[loss for _, loss in ternary if math.isfinite(loss)],
        )
    low, high = GENERIC_RATIO if band is None else band["ratio"]
    evidence.within(
        "ratio_to_full_precision",
        math.exp(statistics.fmean(ratios)),
        low=low,
        high=high,
        reason="geometric mean over paired seeds; "
        + (
            "no golden band for this data, size, schedule and objective; losses from "
            f"{floor:.3g} nats on"
            if band is None
            else "golden band"
        ),
        samples=[ratio for ratio in ratios if math.isfinite(ratio)],
    )
    _learns_at_all(evidence, ternary, full, known, guessing)


def _learns_at_all(evidence, ternary, full, known, guessing):
    """The ternary loss falls where that of the twin ends well below `known`, that of guessing.

    The ratio cannot tell: a twin that ends above a quarter of what guessing costs leaves room for
    a model that guesses. Nor does a fall to guessing, from an output layer drawn too wide.
    """
    learned = known - statistics.fmean(tail for _, tail in full)
    if learned > LEARNED * known:
        evidence.at_least(
            "learned_share",
            statistics.fmean(smallest((first, guessing)) - tail for first, tail in ternary)
            / learned,
            limit=LEAST_LEARNED,
            reason="nats the ternary loss falls below guessing over those of full precision",
        )


def _log(loss):
    return math.log(loss) if loss > 0 else math.nan


def tail_loss(subject, task, seed, precision):
    """Mean training loss of the end of a short run."""
    return _ends(subject, task, seed, precision)[1]


def _ends(subject, task, seed, precision):
    """Training loss of the first step of a short run, and its mean over the last ones."""
    options = TrainOptions(steps=BAND_STEPS, seed=seed, precision=precision)
    losses = [record.loss for record in steps(subject.session(task, options), BAND_STEPS)]
    return losses[0], statistics.fmean(losses[-BAND_TAIL:])


def _loss_of_guessing(subject, task):
    """Of one among all classes or tokens; 0 where the data are not declared."""
    if not isinstance(subject, LoadsData):
        return 0.0
    return math.log(max(1, subject.data_info(task).cardinality))


def band_key(subject, task):
    """What a golden band is bound to, as JSON values."""
    options = TrainOptions(steps=BAND_STEPS)
    return {
        "task": task,
        "data_digest": subject.data_info(task).digest,
        "parameters": subject.model_spec(task).parameters,
        "schedule": asdict(subject.schedule_spec(task, options)),
        "objective": objective(subject, task),
    }


def _golden_band(subject, task):
    if not callable(getattr(subject, "data_info", None)):
        return None
    bands = json.loads((fixtures_dir() / "training" / "loss_bands.json").read_text("utf-8"))
    if not descends_loss(subject, task, TrainOptions(steps=BAND_STEPS)):
        return None
    key = band_key(subject, task)
    return next((band for band in bands["bands"] if band["key"] == key), None)


@pytest.mark.forge_check("training.throughput_recorded")
def test_throughput_recorded(subject, evidence):
    """A training step's samples per second are known, and the clock of the steps is honest.

    Oracle: the wall clock around the same 20 steps. Reported seconds are at most that, and at
    least half: the rest of a step call is bookkeeping.
    """
    task = only_cheapest(subject, evidence)
    session = subject.session(task, TrainOptions(steps=24))
    steps(session, 4)
    start = time.perf_counter()
    records = steps(session, 20)
    elapsed = time.perf_counter() - start
    rates = [len(record.sample_ids) / record.seconds for record in records if record.seconds > 0]
    evidence.record(
        "throughput",
        statistics.median(rates) if rates else math.nan,
        unit="samples/s",
        reason="median over 20 steps after 4 to warm up",
        samples=rates,
    )
    evidence.within(
        "reported_share_of_time",
        sum(record.seconds for record in records) / elapsed,
        low=0.5,
        high=1.01,
        reason="seconds the steps report over the wall clock around them",
    )


@pytest.mark.forge_check("training.convergence_rate")
def test_convergence_rate(quality_study, subject, policy, evidence, forge_seed, tmp_path):
    """The share of seeds that converge, task by task, with its exact interval.

    Oracle: a ternary run converged when it is finite, its training loss fell, and it reaches 95 %
    of the mean full-precision accuracy of its task. Clopper-Pearson, because ten clean runs of
    ten prove no more than 69 %. Oracle for what the study says: the packages of some of its runs,
    evaluated from their files.
    """
    limit = policy.threshold("gates.training_stability.at_least")
    for task, arms in _by_task(quality_study).items():
        target = CONVERGED * _mean_accuracy(arms["full"])
        _measure_again(evidence, subject, task, _some(arms["ternary"], forge_seed), tmp_path)
        reached = [_converged(run, target) for run in arms["ternary"]]
        low, high = clopper_pearson(sum(reached), len(reached))
        count = several(len(reached), "run")
        evidence.record(f"{task}.rate_low", low, reason=f"exact 95 % interval, {count}")
        evidence.record(f"{task}.rate_high", high, reason="upper end")
        evidence.at_least(
            f"{task}.rate",
            sum(reached) / len(reached) if reached else math.nan,
            limit=limit,
            reason="share of ternary runs that converge",
            samples=[float(hit) for hit in reached],
        )


def _some(runs, seed):
    """As many of the runs that show a package as are measured again, from one drawn by the seed."""
    shown = [run for run in runs if run.package]
    first = seed % max(1, len(shown))
    return (shown[first:] + shown[:first])[:MEASURED_AGAIN]


def _measure_again(evidence, subject, task, runs, folder):
    runs = runs if isinstance(subject, ExportsWeights) else []
    evidence.record(
        f"{task}.measured_again",
        len(runs),
        unit="runs",
        reason="by their packages; the others' accuracies are the study's word",
    )
    if not runs:
        return
    differences = {}
    for run in runs:
        found = subject.evaluate_package(run.package_task or task, unpacked(run, folder))
        differences[run.seed] = abs(found["accuracy"] - run.accuracy)
    evidence.at_most(
        f"{task}.accuracy_difference",
        largest(differences.values()),
        limit=ACCURACY_TOLERANCE,
        reason="what the study says against the package, measured again; seeds "
        + ", ".join(map(str, differences)),
    )


def _converged(run, target):
    falls = len(run.curve) < 2 or run.curve[-1][1] < run.curve[0][1]
    return run.finite and falls and run.accuracy >= target


@pytest.mark.forge_check("training.steps_to_quality")
def test_steps_to_quality(quality_study, evidence):
    """How many steps ternary training needs for a stated quality, against full precision.

    The quality is 95 % of the mean final full-precision accuracy; the first evaluated point of a
    run at or above it counts, and a run that never gets there counts as infinite. Limit 2: three
    times the measured excess (1.2 to 1.5), and a point of the curve is a tenth of the run. Points
    before the last are the study's word: no package is left of them (`convergence_rate` measures
    the last ones again).
    """
    for task, arms in _by_task(quality_study).items():
        target = CONVERGED * _mean_accuracy(arms["full"])
        first = {
            arm: {run.seed: _first_at(run, target) for run in runs} for arm, runs in arms.items()
        }
        for arm, by_seed in first.items():
            values = [steps for steps in by_seed.values() if math.isfinite(steps)]
            if values:
                evidence.record(
                    f"{task}.{arm}_steps",
                    statistics.median(values),
                    unit="steps",
                    reason=f"median to {target:.1%} correct; {len(values)} of {len(by_seed)} runs",
                    samples=values,
                )
        paired = sorted(first["ternary"].keys() & first["full"].keys())
        ratios = [_ratio(first["ternary"][seed], first["full"][seed]) for seed in paired]
        evidence.at_most(
            f"{task}.steps_ratio",
            statistics.median(ratios) if ratios else math.nan,
            limit=2.0,
            reason="median over paired seeds, ternary over full precision",
        )


def _ratio(ternary, full):
    """Infinite where the ternary run never gets there, though its twin does not either."""
    return ternary / full if math.isfinite(ternary) else math.inf


def _first_at(run, target):
    points = [*run.curve, (run.steps - 1, 0.0, run.accuracy)]
    return next((step + 1 for step, _, accuracy in points if accuracy >= target), math.inf)


def _by_task(study):
    """Task -> arm -> its runs; both trained arms must be there."""
    runs = defaultdict(lambda: {"ternary": [], "full": []})
    for run in study:
        if run.arm in ("ternary", "full"):
            runs[run.task][run.arm].append(run)
    if not runs:
        pytest.skip("the quality study has no runs")
    return runs


def _mean_accuracy(runs):
    return statistics.fmean(run.accuracy for run in runs) if runs else math.nan
