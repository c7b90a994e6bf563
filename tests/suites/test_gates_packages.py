"""Gates on what was trained: a study that says other things than its packages is found."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.subject.study import study_run
from forge_harness.training import quality
from forge_harness.training.ingredients import reference_model
from forge_harness.types import Outcome

from .test_gates_trained import check, quality_run

SEEDS = (0, 1)
SHORT = (quality.STUDIES, ("digits", "quick"), quality.Study(seeds=2, steps=120))


class Digits(ReferenceSubject):
    """The reference subject, of whose study only the small model is trained, and shortly."""

    def quality_plan(self, profile):
        return [("digits", arm, seed) for arm in ("full", "ternary") for seed in SEEDS]


@pytest.fixture(scope="module")
def study():
    """Each arm over two seeds, the ternary ones with their packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(*SHORT)
        subject = Digits()
        plan = subject.quality_plan("quick")
        return [run for row in plan for run in subject.quality_run(*row, "quick")]


def of_ternary(study, change):
    return [change(run) if run.arm == "ternary" else run for run in study]


@pytest.mark.parametrize("name", ["accuracy", "compression_ratio"])
@pytest.mark.parametrize("seed", SEEDS)
def test_packages_that_are_what_was_measured_pass(run_check, study, name, seed):
    run = run_check(f"gates.{name}", Digits(), study=study, seed=seed)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")
    assert run.evidence("packages_shown.digits") == 2
    assert run.evidence("package_loss_difference.digits") == 0
    assert run.evidence("ternary_weights.digits") == 6


def flattered(run):
    """The loss is not the package's."""
    return replace(run, loss=0.99 * run.loss)


def recounted(run):
    """Accuracy and counts are not the package's, and agree with each other."""
    counts = tuple(size - 1 for size in run.block_size)
    return replace(run, block_correct=counts, accuracy=sum(counts) / sum(run.block_size))


def understated(run):
    """A package smaller than its files."""
    return replace(run, package_bytes=run.package_bytes // 2)


def in_full_precision(run):
    """V01: what is shown holds the full-precision weights."""
    model = ReferenceSubject().build_model("digits", seed=run.seed)
    files = {"model.safetensors": save(dict(model.state_dict())), "config.json": b"{}"}
    package = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return replace(run, package=package, package_bytes=sum(map(len, files.values())))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flattered, "package_loss_difference.digits is 0.01"),
        (recounted, "package_accuracy_difference.digits is 0.0"),
        (understated, "package_size.digits is"),
        (in_full_precision, "ternary_weights.digits is 0"),
    ],
)
def test_a_study_that_its_packages_contradict_is_found(run_check, study, change, reason):
    run = run_check("gates.accuracy", Digits(), study=of_ternary(study, change))
    assert run.outcome is Outcome.FAIL
    assert reason in run.reason


def test_convergence_is_that_of_the_packages(run_check, study):
    run = run_check("training.convergence_rate", Digits(), study=study)
    assert run.evidence("digits.measured_again") == 2
    assert run.evidence("digits.accuracy_difference") == 0


def test_a_run_that_did_not_converge_as_it_says_is_found(run_check, study):
    changed = of_ternary(study, lambda run: recounted(run) if run.seed else run)
    run = run_check("training.convergence_rate", Digits(), study=changed)
    assert run.outcome is Outcome.FAIL
    assert "digits.accuracy_difference is 0.0" in run.reason


def test_a_baseline_that_is_what_was_measured_passes(run_check, study):
    run = run_check("gates.quantized_accuracy_ratio", Digits(), study=study)
    assert run.evidence("baselines_shown.digits") == 1
    assert run.evidence("baseline_loss_difference.digits") < 1e-6
    assert run.evidence("baseline_accuracy_difference.digits") == 0


def counted(run, right, size):
    return replace(run, accuracy=right / size, block_correct=(right,), block_size=(size,))


NONE = 3
ARMS = ("full", "ternary", "post_training")


class SomeUnlabelled(Digits):
    """Every seventh validation image is marked to have no label, by a number that is one."""

    def data_info(self, task):
        return replace(super().data_info(task), ignored_target=NONE)

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        marked = torch.tensor([index % 7 == 0 for index in ids])
        return replace(batch, targets=batch.targets.masked_fill(marked, NONE))


def test_a_baseline_is_measured_on_what_has_a_target(run_check, study):
    subject = SomeUnlabelled()
    run = next(run for run in study if run.weights)
    model = subject.inference_model(run.package_task, "full", seed=run.seed)
    model.load_state_dict(load(base64.b64decode(run.weights)))
    size = subject.data_info(run.package_task).validation_size
    batch = subject.batch(run.package_task, "validation", range(size))
    known = batch.targets != NONE
    with torch.no_grad():
        logits, targets = model(batch.inputs)[known], batch.targets[known]
    loss = float(torch.nn.functional.cross_entropy(logits, targets))
    right = int((logits.argmax(-1) == targets).sum())
    changed = [
        replace(counted(other, right - ARMS.index(other.arm), len(targets)), package={}, loss=loss)
        for other in study
    ]
    found = run_check("gates.quantized_accuracy_ratio", subject, study=changed)
    assert found.evidence("baseline_loss_difference.digits") < 1e-6
    assert found.evidence("baseline_accuracy_difference.digits") < 1e-9


class Noisy(ReferenceSubject):
    """Validation images with noise, under the digest of those without."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        noise = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(0))
        return replace(batch, inputs=batch.inputs + 0.25 * noise * (split == "validation"))


def test_a_baseline_that_was_evaluated_on_other_data_is_found(run_check, study, monkeypatch):
    monkeypatch.setitem(*SHORT)
    changed = [run for run in study if run.arm == "ternary"]
    changed += [
        run
        for seed in SEEDS
        for run in study_run(
            "digits",
            "full",
            seed,
            "quick",
            build_model=reference_model,
            load=Noisy(),
            export=Digits().export_package,
        )
    ]
    run = run_check("gates.quantized_accuracy_ratio", Digits(), study=changed)
    assert run.outcome is Outcome.FAIL
    assert "baseline_loss_difference.digits is " in run.reason


def full_precision_arm(run):
    """V01: the ternary arm was trained in full precision; its size is what was hoped for."""
    if run.arm != "ternary":
        return run
    other = quality_run(run.task, "full", run.seed)
    return replace(other, arm="ternary", package_bytes=other.full_precision_bytes // 11)


@pytest.mark.parametrize(
    "name", ["accuracy", "quantized_accuracy_ratio", "training_stability", "compression_ratio"]
)
def test_an_arm_that_was_trained_twice_in_full_precision_is_found(run_check, name):
    run = check(run_check, name, full_precision_arm)
    assert run.outcome is Outcome.FAIL
    assert "identical_arms is 2 pairs, expected 0 pairs" in run.reason
    assert "bytes: full and ternary" in run.reason


def test_a_study_without_packages_says_so(run_check):
    run = check(run_check, "accuracy")
    assert run.outcome is Outcome.PASS
    (shown,) = [e for e in run.items[0].evidence if e.name == "packages_shown.digits"]
    assert (shown.value, shown.unit) == (0, "runs")
    assert "the subject's own word" in shown.reason


def test_a_study_that_shows_no_full_precision_weights_says_so(run_check):
    run = check(run_check, "quantized_accuracy_ratio")
    assert run.outcome is Outcome.PASS
    (shown,) = [e for e in run.items[0].evidence if e.name == "baselines_shown.digits"]
    assert (shown.value, shown.unit) == (0, "runs")
    assert "the study's own word" in shown.reason
