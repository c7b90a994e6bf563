"""Gates on what was trained: quality, stability, memory, size."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from forge_harness.errors import several
from forge_harness.evidence import largest, smallest
from forge_harness.scoring.statistics import (
    clopper_pearson,
    paired_ratio_interval,
    ratio_interval,
)

ARMS = ("ternary", "full", "post_training")
CONTROL_FACTOR = 5
"""The negative control must lose, five times over, what the gate lets quantization lose. On a task
where plain post-training ternarization does no harm, a good ratio proves nothing."""
CONVERGED = 0.95
"""A run converged when it is finite and reaches this share of full-precision accuracy."""


@pytest.mark.forge_check("gates.accuracy")
def test_quantized_accuracy(study, accuracy_tasks, evidence, limit):
    """Held-out accuracy of the ternary models, over every planned seed.

    Oracle for what the study says: the package of one seed, evaluated from its files.
    """
    if not accuracy_tasks:
        pytest.skip("the study has no classification task; next-token accuracy has no fixed scale")
    study.require_complete(evidence)
    study.hold_packages(evidence, accuracy_tasks)
    means = {}
    for task in accuracy_tasks:
        for arm in ARMS:
            per_seed = [run.accuracy for run in study.arm(task, arm)]
            if per_seed:
                mean = statistics.fmean(per_seed)
                evidence.record(
                    f"accuracy.{task}.{arm}",
                    mean,
                    reason="mean over all seeds",
                    samples=finite(per_seed),
                )
        means[task] = mean_of(study, task, "ternary")
        worst_seed = smallest(run.accuracy for run in study.arm(task, "ternary"))
        evidence.record(f"accuracy_worst_seed.{task}", worst_seed, reason="lowest of the seeds")
    evidence.at_least(
        "accuracy",
        smallest(means.values()),
        **limit("accuracy.at_least"),
        reason="share correct of the ternary model, mean over all seeds, lowest task",
    )


@pytest.mark.forge_check("gates.quantized_accuracy_ratio")
def test_quantized_over_full_precision(study, evidence, limit, policy):
    """Ternary over full precision, paired by seed and held-out block, with a negative control.

    Oracles for what the study says: the package of one seed a task, evaluated from its files, and
    the full-precision weights of one, on the validation split as `LoadsData` delivers it. All arms
    of a seed have the same steps and parameters: a baseline that trained less proves nothing.
    A control that is as good is no defect of the subject: a bad ratio stays red, a good one is not
    measured.
    """
    study.require_complete(evidence)
    study.hold_packages(evidence)
    study.hold_baselines(evidence)
    for task in study.tasks:
        describe(study, task, evidence)
    intervals = {task: compare(study, task, evidence, policy) for task in study.compared}
    least = policy.threshold("gates.quantized_accuracy_ratio.at_least")
    undecided = [task for task, found in intervals.items() if found.low < least <= found.high]
    if undecided and not any(found.high < least for found in intervals.values()):
        pytest.skip(
            "; ".join(inconclusive(study, task, intervals[task], least) for task in undecided)
        )
    if intervals:
        evidence.at_least(
            "quantized_accuracy_ratio",
            smallest(found.low for found in intervals.values()),
            **limit("quantized_accuracy_ratio.at_least"),
            reason="ternary over full-precision accuracy: lower end of the 95 % interval, lowest "
            "task",
        )
    if harmless := [task for task in intervals if control_of(study, task) > control_limit(policy)]:
        pytest.skip("; ".join(proves_nothing(study, task, policy) for task in harmless))
    study.require_compared()


def control_of(study, task):
    """Accuracy of plain post-training ternarization over that of full precision."""
    control, full = (counts(study.arm(task, arm)) for arm in ("post_training", "full"))
    return sum(map(sum, control)) / sum(map(sum, full))


def control_limit(policy):
    """The largest control ratio that shows that a bad quantization would be seen.

    A limit of the gate that nothing misses, 0 and less, turns it off: no control is needed.
    """
    least = policy.threshold("gates.quantized_accuracy_ratio.at_least")
    return least**CONTROL_FACTOR if least > 0 else math.inf


def proves_nothing(study, task, policy):
    """Why a task on which every quantization is good says nothing of this one."""
    found, limit = control_of(study, task), control_limit(policy)
    return (
        f"{task} cannot tell a good quantization from a bad one: plain post-training ternarization "
        f"has a control_ratio of {found:.4f} there, at most {limit:.4f} is visible harm; "
        "take a harder task or a smaller model"
    )


def inconclusive(study, task, found, least):
    """Why an interval that holds the limit decides nothing, and how many seeds would."""
    seeds = len(study.arm(task, "full"))
    sentence = (
        f"inconclusive: the {task} ratio {found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]"
    )
    sentence += f" of {seeds} seeds holds the limit {least:g}"
    if found.estimate <= least:
        return sentence
    share = (found.estimate - found.low) / (found.estimate - least)
    return f"{sentence}; about {math.ceil(seeds * share**2)} seeds would decide"


def describe(study, task, evidence):
    """Records what was compared: data, seeds, learning rates, steps, means and loss curves."""
    # A seed may choose its fold; the arms it is compared over may not.
    versions = {(run.seed, run.data_digest) for run in study.runs if run.task == task}
    digests = sorted({digest for _, digest in versions})
    evidence.equal(
        f"data_versions.{task}",
        len(versions),
        expected=len({seed for seed, _ in versions}),
        reason="all arms of a seed name one digest of their data",
    )
    evidence.record(
        f"data_digest.{task}", ", ".join(digests), reason="digests of the data, one a fold"
    )
    for arm in ARMS:
        runs = study.arm(task, arm)
        if not runs:
            continue
        name = f"{task}.{arm}"
        evidence.record(f"seeds.{name}", len(runs), samples=[run.seed for run in runs])
        evidence.record(f"steps.{name}", runs[0].steps, unit="steps")
        evidence.record(f"learning_rate.{name}", runs[0].learning_rate, reason="tuned for this arm")
        evidence.record(
            f"accuracy.{name}",
            mean_of(study, task, arm),
            reason="mean over all seeds",
            samples=finite(run.accuracy for run in runs),
        )
        evidence.record(
            f"loss.{name}",
            statistics.fmean(run.loss for run in runs),
            unit="nats",
            reason="held-out cross-entropy, mean over all seeds",
            samples=finite(run.loss for run in runs),
        )
        steps, losses = study.curve(task, arm)
        if losses:
            evidence.record(f"loss_curve_steps.{name}", len(steps), unit="points", samples=steps)
            evidence.record(f"loss_curve.{name}", losses[-1], unit="nats", samples=losses)


def compare(study, task, evidence, policy):
    """Records ratios and the negative control; returns the interval of the accuracy ratio."""
    ternary, full = study.arm(task, "ternary"), study.arm(task, "full")
    control = study.arm(task, "post_training")
    evidence.equal(
        f"unpaired_runs.{task}",
        sum(
            (run.seed, run.block_size) != (other.seed, other.block_size)
            for arm in (ternary, control)
            for run, other in itertools.zip_longest(arm, full, fillvalue=NONE)
        ),
        expected=0,
        reason="every arm has the same seeds and is evaluated on the same held-out blocks",
    )
    unequal = unequal_arms(full, [*ternary, *control])
    evidence.equal(
        f"unequal_arms.{task}",
        len(unequal),
        expected=0,
        unit="runs",
        reason="trained for other steps than full precision of their seed, or of other size: "
        f"{'; '.join(unequal[:3]) or 'none'}",
    )
    blocks = {len(run.block_size) for run in full}
    if len(full) < 2 or len(blocks) != 1 or blocks == {1}:
        count = several(len(full), "seed")
        pytest.skip(f"{task} has {count}; an interval needs two seeds and two blocks")
    interval = ratio_interval(counts(ternary), counts(full))
    evidence.record(f"ratio.{task}", interval.estimate, reason=interval.method)
    evidence.record(f"ratio_low.{task}", interval.low, reason="lower end, 95 %")
    evidence.record(f"ratio_high.{task}", interval.high, reason="upper end, 95 %")
    loss = paired_ratio_interval([run.loss for run in ternary], [run.loss for run in full])
    evidence.record(f"loss_ratio.{task}", loss.estimate, reason=f"bits per byte too; {loss.method}")
    evidence.record(f"loss_ratio_high.{task}", loss.high, reason="upper end, 95 %")
    evidence.record(
        f"control_ratio.{task}",
        control_of(study, task),
        reason="plain post-training ternarization over full precision; a ratio is measured where "
        f"this is at most {control_limit(policy):.4f}, visible harm",
    )
    return interval


def unequal_arms(full, others):
    """Names runs that had other steps or parameters than the full-precision run of their seed.

    One that met a non-finite value ended early, to its own harm.
    """
    partners = {run.seed: run for run in full}
    pairs = [(run, partners[run.seed]) for run in others if run.seed in partners]
    return [
        f"{run.arm} of seed {run.seed} {run.steps} steps and {run.parameters} parameters, full "
        f"{partner.steps} and {partner.parameters}"
        for run, partner in pairs
        if run.parameters != partner.parameters or (run.steps != partner.steps and run.finite)
    ]


class NONE:
    """Stands for the partner a run does not have."""

    seed, block_size = None, None


def counts(runs):
    """Correct predictions, shape (seeds, blocks)."""
    return [list(run.block_correct) for run in runs]


def mean_of(study, task, arm):
    """Mean accuracy over the seeds of an arm; NaN when there is none."""
    values = [run.accuracy for run in study.arm(task, arm)]
    return statistics.fmean(values) if values else math.nan


def finite(values):
    """The values a plot can show."""
    return [value for value in values if math.isfinite(value)]


@pytest.mark.forge_check("gates.training_stability")
def test_share_of_converging_runs(study, evidence, limit):
    """How many of the ternary runs are finite and come near full precision."""
    study.require_complete(evidence)
    runs = [run for task in study.compared for run in study.arm(task, "ternary")]
    if not study.compared:
        study.require_compared()
    reached = [
        run.finite and run.accuracy >= CONVERGED * mean_of(study, run.task, "full") for run in runs
    ]
    low, high = clopper_pearson(sum(reached), len(reached))
    evidence.record(
        "converged_runs", sum(reached), unit="runs", samples=[float(r) for r in reached]
    )
    evidence.record("training_stability_low", low, reason="exact 95 % interval, lower end")
    evidence.record("training_stability_high", high, reason="exact 95 % interval, upper end")
    evidence.at_least(
        "training_stability",
        sum(reached) / len(runs) if runs else math.nan,
        **limit("training_stability.at_least"),
        reason=f"finite, and {CONVERGED:.0%} of full-precision accuracy, over all ternary runs",
    )
    study.require_compared()


@pytest.mark.forge_check("gates.resource_use")
def test_peak_memory(study, evidence, limit):
    """Peak resident memory of the training processes, as the kernel counts it."""
    peaks = [run.peak_rss_bytes / 1e9 for run in study.runs if run.peak_rss_bytes]
    if not peaks:
        pytest.skip("no run of the study says its peak memory")
    evidence.at_most(
        "resource_use",
        largest(peaks),
        **limit("resource_use.at_most"),
        reason="highest peak resident memory of any training process",
        samples=peaks,
    )


@pytest.mark.forge_check("gates.compression_ratio")
def test_package_size(study, evidence, limit):
    """Size on disk of the exported ternary package against the same weights in fp32.

    Oracle: the package one seed a task shows, by the file system, and what its files store.
    """
    study.require_complete(evidence)
    ternary = [run for run in study.runs if run.arm == "ternary"]
    unsized = [run for run in ternary if run.package_bytes <= 0 or run.full_precision_bytes <= 0]
    if unsized or not ternary:
        pytest.skip(f"{len(unsized)} of {len(ternary)} ternary runs do not say their package size")
    study.hold_packages(evidence)
    ratios = {task: [] for task in study.tasks}
    for run in ternary:
        ratios[run.task].append(run.full_precision_bytes / run.package_bytes)
    for task, of_task in ratios.items():
        package = max(run.package_bytes for run in study.arm(task, "ternary"))
        evidence.record(f"package_bytes.{task}", package, unit="bytes")
        evidence.record(f"compression_ratio.{task}", smallest(of_task), samples=of_task)
        halves = [run.bf16_bytes for run in study.arm(task, "ternary") if run.bf16_bytes]
        if halves:
            evidence.record(
                f"bf16_ratio.{task}",
                smallest(halves) / package,
                reason="bf16 weights over the package",
            )
    evidence.at_least(
        "compression_ratio",
        smallest(map(smallest, ratios.values())),
        **limit("compression_ratio.at_least"),
        reason="bytes of the fp32 weights over bytes of the package on disk, lowest task",
    )


@pytest.mark.forge_check("gates.model_complexity")
def test_parameter_count(subject, evidence, limit, forge_seed):
    """Parameters counted in the built models."""
    totals = {}
    for task in subject.tasks():
        model = subject.build_model(task, seed=forge_seed)
        # By storage address: tied weights are one tensor under two names.
        unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
        totals[task] = sum(unique.values())
        evidence.record(f"parameters.{task}", totals[task], unit="parameters")
    evidence.at_most(
        "model_complexity",
        largest(totals.values()),
        **limit("model_complexity.at_most"),
        reason="parameters of the largest model, counted once each",
    )
