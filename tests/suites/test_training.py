"""Each training check goes red for a seeded defect, for its own reason, and only then."""

import dataclasses

import pytest

from forge_harness.drill.defects import all_defects, defects_of
from forge_harness.policy import load_policy
from forge_harness.protocols import QualityRun, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = sorted(e.id for e in load_policy().catalogue if e.suite == "training")
DEFECTS = defects_of("training")


def run(arm, seed, accuracy, first_at=60, finite=True):
    """One row of a study whose curve reaches its final accuracy at a step."""
    curve = tuple(
        (step, 2.0 - step / 400, accuracy if step >= first_at else 0.3)
        for step in range(29, 300, 30)
    )
    return QualityRun(
        **{"task": "digits", "arm": arm, "seed": seed, "steps": 300, "learning_rate": 1e-3},
        **{"parameters": 1, "accuracy": accuracy, "loss": 0.1, "finite": finite, "seconds": 1.0},
        **{"block_correct": (9,), "block_size": (10,), "curve": curve, "peak_rss_bytes": 1},
        data_digest="sha256:0",
    )


def study(**ternary):
    defaults = {"accuracy": [0.97] * 10, "first_at": 90, "finite": True} | ternary
    pairs = enumerate(defaults.pop("accuracy"))
    return [run("full", seed, 0.98) for seed in range(10)] + [
        run("ternary", seed, accuracy, **defaults) for seed, accuracy in pairs
    ]


def neither_there(seeds):
    """Runs of which neither arm gets there for five seeds, nor the ternary one for a sixth."""
    return [
        dataclasses.replace(row, accuracy=0.5, curve=())
        if row.seed in seeds or (row.arm, row.seed) == ("ternary", 4)
        else row
        for row in study()
    ]


STUDIES = {
    "half_diverge": ("convergence_rate", study(accuracy=[0.97, 0.5] * 5), "digits.rate is 0.5"),
    "never_finite": ("convergence_rate", study(finite=False), "digits.rate is 0"),
    "no_ternary_run": ("convergence_rate", study(accuracy=[]), "digits.rate is nan"),
    "late": ("steps_to_quality", study(first_at=260), "steps_ratio is 3"),
    "neither_there": ("steps_to_quality", neither_there((0, 1, 2, 3, 6)), "steps_ratio is inf"),
    "never_there": ("steps_to_quality", study(accuracy=[0.5] * 10), "steps_ratio is inf"),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_defect_turns_the_check_red(run_check, defect):
    result = run_check(defect.check, defect.subject())
    assert result.outcome is Outcome.FAIL, result.reason
    assert defect.shows in result.reason


@pytest.mark.parametrize(("check", "runs", "reason"), STUDIES.values(), ids=STUDIES)
def test_study_turns_the_check_red(run_check, check, runs, reason):
    result = run_check(f"training.{check}", ReferenceSubject(), study=runs)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize("check", CHECKS)
def test_reference_is_green(run_check, check):
    result = run_check(check, ReferenceSubject(), study=study())
    assert result.outcome is Outcome.PASS, result.reason


def test_every_check_has_a_defect():
    studied = {f"training.{check}" for check, _, _ in STUDIES.values()}
    assert {defect.check for defect in DEFECTS} | studied == set(CHECKS)


def test_a_check_of_one_task_says_which_it_leaves_out(run_check):
    result = run_check("training.optimizer_state_exact", ReferenceSubject())
    (entry,) = [e for item in result.items for e in item.evidence if e.name == "task"]
    assert entry.value == "digits"
    assert "left out: bytes" in entry.reason


def test_slow_training_is_over_its_limit(run_timed):
    defect = all_defects()["slow_ternary_step"]
    result = run_timed(defect.check, defect.subject())
    assert result.outcome is Outcome.FAIL, result.reason
    assert defect.shows in result.reason


def test_sessions_of_the_defects_still_train():
    """Defects must be alive but not crash: a check that errors proves nothing."""
    for defect in DEFECTS:
        subject = defect.subject()
        session = subject.session(next(iter(subject.tasks()), "digits"), TrainOptions(steps=3))
        for _ in range(3):
            assert session.step().step >= 0


class DigitsOnly(ReferenceSubject):
    def tasks(self):
        return ("digits",)


def cost_of(monkeypatch, run_check, ratio):
    """Runs the check on a clock under which pair i of a setting costs ratio(i) to 1."""
    from forge_harness.scoring import statistics

    true = statistics.paired_median_bounds

    def bounds(candidate, base, *, error):
        return true([ratio(i) for i in range(len(base))], [1.0] * len(base), error=error)

    monkeypatch.setattr(statistics, "paired_median_bounds", bounds)
    return run_check("performance.training_overhead", DigitsOnly())


def test_an_undecided_cost_is_measured_once_more_and_then_said_to_be_open(monkeypatch, run_check):
    noisy = cost_of(monkeypatch, run_check, lambda i: 0.75 if i % 2 else 0.95)
    assert noisy.outcome is Outcome.NOT_MEASURED, noisy.reason
    assert "after 40 pairs" in noisy.reason


def test_the_planned_extension_decides(monkeypatch, run_check):
    settled = cost_of(monkeypatch, run_check, lambda i: 0.7 if i % 4 else 0.9)
    assert settled.outcome is Outcome.PASS, settled.reason


class _EasyTask(ReferenceSubject):
    """Both models have learned the task: what is left of their losses is next to nothing."""

    left = 5.0

    def data_info(self, task):
        return dataclasses.replace(super().data_info(task), digest="sha256:another")

    def session(self, task, options):
        session = super().session(task, options)
        step = session.step
        left = self.left if options.precision == "ternary" else 1.0

        def learned():
            record = step()
            return record if record.step == 0 else dataclasses.replace(record, loss=0.01 * left)

        session.step = learned
        return session


def test_a_ratio_of_two_losses_next_to_nothing_says_nothing(run_check):
    """A sound model with 0.06 nats left was accused, its twin having 0.015."""
    run = run_check("training.loss_within_band", _EasyTask())
    assert run.outcome == "pass", run.reason
    hard = _EasyTask()
    hard.left = 100.0
    run = run_check("training.loss_within_band", hard)
    assert run.outcome == "fail"
    assert "ratio_to_full_precision is" in run.reason


class OneArm(DigitsOnly):
    """Knows no precision but its own."""

    def session(self, task, options):
        return super().session(task, dataclasses.replace(options, precision="ternary"))


@pytest.mark.parametrize(
    "check",
    [
        "training.loss_within_band",
        "performance.peak_memory",
        "performance.training_overhead",
        "performance.training_throughput",
    ],
)
def test_a_session_that_is_compared_with_itself_is_not_measured(run_check, check):
    """A subject that ignores `TrainOptions.precision` was green, with a ratio of 1."""
    result = run_check(check, OneArm())
    assert result.outcome is Outcome.NOT_MEASURED, result.reason
    assert "full-precision session is its ternary one" in result.reason


class IgnoresExtra(DigitsOnly):
    def session(self, task, options):
        return super().session(task, dataclasses.replace(options, extra={}))


def test_settings_that_a_subject_ignores_are_not_said_to_be_measured(run_check):
    result = run_check("performance.peak_memory", IgnoresExtra())
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("settings") == "default"
