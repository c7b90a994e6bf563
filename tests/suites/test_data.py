"""Each data check goes red for its own reason; the seeded defects are ones real pipelines had."""

from dataclasses import replace

import pytest
import torch

from forge_harness.drill.defects import all_benign, defects_of
from forge_harness.drill.defects.data import BENIGN as SOUND_DATA
from forge_harness.drill.defects.delivered import BENIGN as SOUND_INPUTS
from forge_harness.drill.defects.loading import BENIGN as SOUND_ORDERS
from forge_harness.drill.defects.read_order import BENIGN as SOUND_READS
from forge_harness.subject.reference import ReferenceSubject

CHECKS = [
    "readable_and_intact",
    "splits_disjoint",
    "label_or_token_range",
    "balance",
    "loader_order",
    "leak_canary",
]
DEFECTS = defects_of("data")
SOUND = [
    (kind, check)
    for kind in (*SOUND_DATA, *SOUND_INPUTS, *SOUND_ORDERS, *SOUND_READS)
    for check in kind.checks
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_data_are_sound(run_check, name):
    run = run_check(f"data.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_a_defect_turns_its_check_red(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome == "fail", run.reason
    assert defect.shows in run.reason


def test_every_check_has_a_defect():
    assert {defect.check for defect in DEFECTS} == {f"data.{name}" for name in CHECKS}


@pytest.mark.parametrize(
    ("kind", "check"), SOUND, ids=lambda part: getattr(part, "id", str(part).removeprefix("data."))
)
def test_a_sound_subject_of_another_kind_is_no_false_alarm(run_check, kind, check):
    run = run_check(check, kind.subject())
    assert run.outcome == "pass", run.reason


def test_small_splits_of_many_classes_are_further_apart_than_the_limit(run_check):
    many = next(kind for kind in SOUND_DATA if kind.id == "many_small_classes")
    run = run_check("data.balance", many.subject())
    assert run.evidence("digits_distribution_distance") > 0.10


class IgnoresCanaries(ReferenceSubject):
    def session(self, task, options):
        return super().session(task, replace(options, validation_canaries=()))


class ImagesOnly(ReferenceSubject):
    def tasks(self):
        return ("digits",)


class WordPieces(ReferenceSubject):
    """Tokens that are not the bytes of the text."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, inputs=(batch.inputs + 1) % 256) if task == "bytes" else batch


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (ImagesOnly, "no task of the subject has text whose tokens are bytes"),
        (WordPieces, "no task of the subject has text whose tokens are bytes"),
        (IgnoresCanaries, "canaries do not reach the validation split"),
    ],
)
def test_a_canary_that_cannot_be_planted_is_not_measured(run_check, subject, reason):
    run = run_check("data.leak_canary", subject())
    assert run.outcome == "not_measured"
    assert reason in run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_without_data_is_no_error(run_check, name):
    class Nothing:
        name = "nothing"

    assert run_check(f"data.{name}", Nothing()).outcome == "not_measured"


class _Ascii(ReferenceSubject):
    """Text of 128 tokens, and a loss that looks up what it is given."""

    def data_info(self, task):
        info = super().data_info(task)
        return replace(info, cardinality=128) if info.kind == "tokens" else info

    def loss(self, model, batch):
        if batch.inputs.dtype is torch.int64 and int(batch.inputs.max()) > 127:
            raise IndexError("index out of range in self")
        return super().loss(model, batch)


def test_canaries_are_made_of_tokens_the_model_has(run_check):
    """A sound model of ASCII was accused by an IndexError: canaries were of all bytes."""
    run = run_check("data.leak_canary", _Ascii())
    assert run.outcome == "pass", run.reason


def test_too_few_tokens_for_a_canary_are_not_measured(run_check):
    class Few(ReferenceSubject):
        def data_info(self, task):
            info = super().data_info(task)
            return replace(info, cardinality=90) if info.kind == "tokens" else info

    run = run_check("data.leak_canary", Few())
    assert run.outcome == "not_measured"
    assert "58 bytes from 32 on" in run.reason


class _NoTargets(ReferenceSubject):
    """Declares a value that is no target, and delivers nothing else."""

    def tasks(self):
        return ("digits",)

    def data_info(self, task):
        return replace(super().data_info(task), ignored_target=-100)

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, targets=torch.full_like(batch.targets, -100))


def test_targets_that_are_declared_to_be_none_are_left_out(run_check):
    run = run_check("data.label_or_token_range", all_benign()["ignored_targets"].subject())
    assert run.outcome == "pass", run.reason
    assert 0.1 < run.evidence("digits_train_ignored_share") < 0.2


def test_a_split_without_a_target_is_refused(run_check):
    run = run_check("data.label_or_token_range", _NoTargets())
    assert run.outcome == "fail"
    assert "counted_targets is 0" in run.reason
