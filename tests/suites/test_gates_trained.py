"""Gates on what was trained: each goes red for a study with its own defect."""

from __future__ import annotations

import math

import pytest

from forge_harness.protocols import QualityRun, methods_of
from forge_harness.types import Outcome

SEEDS, BLOCKS, SIZE = (0, 1, 2), 8, 1000
SHARES = {
    "digits": {"ternary": 0.980, "full": 0.982, "post_training": 0.86},
    "bytes": {"ternary": 0.578, "full": 0.580, "post_training": 0.36},
}


def quality_run(task, arm, seed, **changes):
    """A run with block counts that follow the arm's share and vary a little over blocks."""
    share = SHARES[task][arm]
    correct = tuple(round(SIZE * share) + (b + seed) % 3 - 1 for b in range(BLOCKS))
    fields = {
        "task": task,
        "arm": arm,
        "seed": seed,
        "steps": 300,
        "learning_rate": 2e-3,
        "parameters": 40_000,
        "accuracy": sum(correct) / (SIZE * BLOCKS),
        "loss": 3.0 * (1 - share) + 0.01 * seed,
        "block_correct": correct,
        "block_size": (SIZE,) * BLOCKS,
        "curve": tuple((step, 2.0 / (1 + step), -1.0) for step in range(0, 300, 10)),
        "finite": True,
        "seconds": 1.0,
        "peak_rss_bytes": 900_000_000,
        "data_digest": f"sha256:{task}",
        "package_bytes": 20_000 if arm == "ternary" else 0,
        "full_precision_bytes": 160_000,
    }
    return QualityRun(**{**fields, **changes})


def study_of(change=None, tasks=tuple(SHARES)):
    """The whole study; `change` maps a run to the run (or None) that takes its place."""
    runs = [quality_run(t, arm, s) for t in tasks for arm in SHARES[t] for s in SEEDS]
    changed = [change(run) if change else run for run in runs]
    return [run for run in changed if run is not None]


def replaced(run, **changes):
    from dataclasses import replace

    return replace(run, **changes)


class Study:
    """A subject that has a plan for the quality comparison and says what its data are."""

    name = "study"
    TASKS = tuple(SHARES)

    def quality_plan(self, profile):
        return [(t, arm, s) for t in self.TASKS for arm in ("ternary", "full") for s in SEEDS]

    def quality_run(self, task, arm, seed, profile):
        return [quality_run(task, arm, seed)]

    def data_info(self, task):
        from types import SimpleNamespace

        return SimpleNamespace(kind="classes" if task == "digits" else "tokens")


for method in set(methods_of("LoadsData")) - {"data_info"}:
    setattr(Study, method, lambda self, *arguments, **options: None)


def check(run_check, name, change=None, **options):
    return run_check(f"gates.{name}", Study(), study=study_of(change), **options)


QUALITY = (
    "accuracy",
    "quantized_accuracy_ratio",
    "training_stability",
    "resource_use",
    "compression_ratio",
)


@pytest.mark.parametrize("name", QUALITY)
def test_a_good_study_passes(run_check, name):
    run = check(run_check, name)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def weak_quantization(run):
    """Ternary models lose 3 %."""
    if run.arm != "ternary":
        return run
    correct = tuple(round(c * 0.97) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


def noisy_quantization(run):
    """The mean ratio is over the limit, but one seed in three is far off."""
    if run.arm != "ternary" or run.seed != 2:
        return run
    correct = tuple(round(c * 0.985) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


def control_as_good(run):
    """Post-training ternarization does no harm: the task proves nothing."""
    if run.arm != "post_training":
        return run
    full = quality_run(run.task, "full", run.seed)
    return replaced(run, block_correct=full.block_correct, accuracy=full.accuracy)


def bad_control(run):
    """Post-training ternarization leaves chance."""
    if run.arm != "post_training":
        return run
    correct = tuple(c // 5 for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


def best_seed_only(run):
    """R20: two of three seeds are left out."""
    return run if run.seed == 0 else None


def claimed_accuracy(run):
    """The accuracy is not that of the counts."""
    return replaced(run, accuracy=0.999) if run.arm == "ternary" else run


def other_seeds(run):
    """Ternary and full precision are not paired."""
    return replaced(run, seed=run.seed + 10) if run.arm == "ternary" else run


def other_data(run):
    """One arm saw another corpus."""
    return replaced(run, data_digest="sha256:other") if run.arm == "full" else run


def other_blocks(run):
    """One arm is evaluated on other blocks."""
    if run.arm != "ternary":
        return run
    return replaced(run, block_size=(SIZE + 1,) * (BLOCKS - 1) + (SIZE - BLOCKS + 1,))


def few_steps(run):
    """Full precision is trained for an eighth of the steps."""
    return replaced(run, steps=40) if run.arm != "ternary" else run


def narrow_baseline(run):
    """Full precision is a model of half the size."""
    return replaced(run, parameters=20_000) if run.arm == "full" else run


def nan_accuracy(run):
    """One run diverged and reports NaN."""
    if (run.arm, run.seed) != ("ternary", 1):
        return run
    return replaced(run, accuracy=math.nan, loss=math.nan, finite=False)


def one_diverged(run):
    """One digits seed stays at chance."""
    if (run.task, run.arm, run.seed) != ("digits", "ternary", 1):
        return run
    correct = (SIZE // 10,) * BLOCKS
    return replaced(run, block_correct=correct, accuracy=0.1)


def one_not_finite(run):
    """One run met a NaN on its way."""
    return replaced(run, finite=False) if (run.arm, run.seed) == ("ternary", 0) else run


def hungry(run):
    """One process needs 9 GB."""
    return replaced(run, peak_rss_bytes=9_000_000_000) if run.seed == 1 else run


def latent_exported(run):
    """E07: the package holds latent weights instead of ternary codes."""
    return replaced(run, package_bytes=run.full_precision_bytes) if run.arm == "ternary" else run


def poor_digits(run):
    """Ternary digits at 80 %."""
    if run.task != "digits":
        return run
    correct = tuple(round(c * 0.8) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("accuracy", poor_digits, "accuracy is 0.78"),
        ("accuracy", nan_accuracy, "miscounted_runs is 2"),
        ("accuracy", claimed_accuracy, "miscounted_runs is 6"),
        ("accuracy", best_seed_only, "missing_runs is 12"),
        ("quantized_accuracy_ratio", weak_quantization, "quantized_accuracy_ratio is 0.96"),
        ("quantized_accuracy_ratio", best_seed_only, "missing_runs is 12"),
        ("quantized_accuracy_ratio", other_seeds, "missing_runs is 6"),
        ("quantized_accuracy_ratio", other_data, "data_versions.bytes is 6, expected 3"),
        ("quantized_accuracy_ratio", other_blocks, "unpaired_runs.bytes is"),
        ("quantized_accuracy_ratio", few_steps, "unequal_arms.bytes is 3 runs"),
        ("quantized_accuracy_ratio", narrow_baseline, "unequal_arms.bytes is 6 runs"),
        ("training_stability", one_diverged, "training_stability is 0.833333"),
        ("training_stability", one_not_finite, "training_stability is 0.666667"),
        ("resource_use", hungry, "resource_use is 9 GB, over its limit of 8 GB"),
        ("compression_ratio", latent_exported, "compression_ratio is 1, under"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_bad_study_fails(run_check, name, change, reason):
    run = check(run_check, name, change)
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith(reason)


def unsized(run):
    return replaced(run, package_bytes=0)


def without_memory(run):
    return replaced(run, peak_rss_bytes=0)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("compression_ratio", unsized, "6 of 6 ternary runs do not say"),
        ("resource_use", without_memory, "no run of the study says"),
        ("quantized_accuracy_ratio", noisy_quantization, "inconclusive: the bytes ratio 0.99"),
        ("quantized_accuracy_ratio", control_as_good, "bytes cannot tell a good quantization from"),
    ],
)
def test_what_the_study_does_not_say_is_not_measured(run_check, name, change, reason):
    run = check(run_check, name, change)
    assert run.outcome is Outcome.NOT_MEASURED
    assert run.reason.startswith(reason)


def test_a_bad_ratio_is_red_whatever_the_control_says(run_check):
    run = check(
        run_check, "quantized_accuracy_ratio", lambda run: weak_quantization(control_as_good(run))
    )
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith("quantized_accuracy_ratio is 0.96")


@pytest.mark.parametrize(("least", "control"), [(0.75, bad_control), (0, control_as_good)])
def test_a_lenient_limit_leaves_the_control_of_use(run_check, tmp_path, least, control):
    """The limit of the control was -0.25 and -4 there, which none can meet."""
    lenient = tmp_path / "lenient.toml"
    lenient.write_text(f"[thresholds.gates]\nquantized_accuracy_ratio.at_least = {least}\n")
    options = ("--forge-policy", str(lenient))
    run = check(run_check, "quantized_accuracy_ratio", control, arguments=options)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def ended_early(run):
    """One ternary run met a NaN at step 290, and is as good as the others."""
    if (run.arm, run.seed) != ("ternary", 0):
        return run
    return replaced(run, steps=290, finite=False)


def test_a_ternary_run_that_ended_early_is_not_what_the_ratio_is_red_for(run_check):
    run = check(run_check, "quantized_accuracy_ratio", ended_early)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_one_seed_gives_no_interval(run_check):
    class OneSeed(Study):
        def quality_plan(self, profile):
            return [row for row in super().quality_plan(profile) if row[2] == 0]

    run = run_check("gates.quantized_accuracy_ratio", OneSeed(), study=study_of(best_seed_only))
    assert run.outcome is Outcome.NOT_MEASURED
    assert "has 1 seed; an interval needs two" in run.reason


@pytest.mark.parametrize("alone", [("bytes",), ("bytes", "digits")], ids=" and ".join)
@pytest.mark.parametrize("name", ["quantized_accuracy_ratio", "training_stability"])
def test_a_task_that_is_trained_in_ternary_alone_is_compared_with_nothing(run_check, name, alone):
    """It was red: no run converged, and every one lacked its pair."""

    class Alone(Study):
        def quality_plan(self, profile):
            plan = super().quality_plan(profile)
            return [row for row in plan if row[1] == "ternary" or row[0] not in alone]

    def without(run):
        return None if run.task in alone and run.arm != "ternary" else run

    found = run_check(f"gates.{name}", Alone(), study=study_of(without))
    assert found.outcome is Outcome.NOT_MEASURED
    assert (
        found.reason == f"quality_plan has no full-precision run of {', '.join(alone)} to compare"
    )
    worse = {"quantized_accuracy_ratio": weak_quantization, "training_stability": one_not_finite}
    bad = study_of(lambda run: without(run) and worse[name](run))
    red = run_check(f"gates.{name}", Alone(), study=bad).outcome
    assert red is (Outcome.NOT_MEASURED if "digits" in alone else Outcome.FAIL)


def test_a_study_of_tokens_has_no_absolute_accuracy(run_check):
    class OnlyBytes(Study):
        TASKS = ("bytes",)

    run = run_check("gates.accuracy", OnlyBytes(), study=study_of(tasks=("bytes",)))
    assert run.outcome is Outcome.NOT_MEASURED


def test_the_report_finds_its_curves(run_check):
    evidence = {
        record.name: record
        for record in check(run_check, "quantized_accuracy_ratio").items[0].evidence
    }
    for task, arm in (("digits", "ternary"), ("digits", "full"), ("bytes", "ternary")):
        curve = evidence[f"loss_curve.{task}.{arm}"].samples
        steps = evidence[f"loss_curve_steps.{task}.{arm}"].samples
        assert len(curve) == len(steps) == 30
        assert curve[0] == 2.0
    assert evidence["ratio_low.digits"].value < evidence["ratio.digits"].value
    assert evidence["data_digest.bytes"].value == "sha256:bytes"


class Builds:
    """A subject whose models have a given number of parameters."""

    name = "builds"

    def __init__(self, width=100):
        self.width = width

    def tasks(self):
        return ["small", "large"]

    def build_model(self, task, *, seed):
        from torch import nn

        width = self.width if task == "large" else 4
        model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width))
        model[1].weight = model[0].weight
        return model


for method in set(methods_of("BuildsModel")) - {"tasks", "build_model"}:
    setattr(Builds, method, lambda self, *arguments, **options: None)


def test_parameters_are_counted_once(run_check):
    run = run_check("gates.model_complexity", Builds())
    assert run.outcome is Outcome.PASS
    assert run.evidence("parameters.large") == 100 * 100 + 100


def test_a_model_over_its_budget_fails(run_check):
    run = run_check("gates.model_complexity", Builds(width=1415))
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith("model_complexity is 2003640 parameters, over its limit")
