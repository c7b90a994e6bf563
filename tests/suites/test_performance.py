"""Performance: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

import pytest
import torch

from forge_harness.drill.defects import all_defects, defects_of
from forge_harness.model.packed_model import pack_model
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = (
    "kernel_against_reference",
    "kernel_roofline",
    "inference_speedup",
    "compression",
    "peak_memory",
    "training_throughput",
)


# The check of the training overhead has its defect among those of training.
DEFECTS = [d for d in defects_of("performance") if d.check in {f"performance.{c}" for c in CHECKS}]


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_subject_passes(run_timed, check):
    run = run_timed(f"performance.{check}")
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_a_defect_is_found(run_timed, defect):
    run = run_timed(defect.check, defect.subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert defect.shows in run.reason


def test_every_check_has_a_defect():
    assert {defect.check for defect in DEFECTS} == {f"performance.{name}" for name in CHECKS}


def test_the_narrow_accumulator_passes_on_random_codes():
    """Why the check has directed inputs: the known-bad kernel is right nearly everywhere."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (4, 2560), generator=generator).to(torch.int8)
    codes = torch.randint(-1, 2, (64, 2560), generator=generator).to(torch.int8)
    narrow = all_defects()["K08_product_sums_in_int16"].subject()
    found = narrow.prepare_product("reference", codes)(q)
    assert torch.equal(found.long(), q.long() @ codes.long().t())


def test_without_native_kernels_there_is_no_ceiling(run_check, monkeypatch):
    from forge_harness import kernels

    monkeypatch.setattr(kernels, "native_problem", lambda: "not built")
    assert run_check("performance.kernel_roofline").outcome is Outcome.NOT_MEASURED


def test_more_than_the_ceiling_is_not_measured(run_check, monkeypatch):
    from forge_harness.kernels.backends import native

    extension = native()
    real = extension.probe_multiply

    def disturbed(path, operations, threads):
        real(path, 5 * operations, threads)
        return real(path, operations, threads)

    monkeypatch.setattr(extension, "probe_multiply", disturbed)
    run = run_check("performance.kernel_roofline")
    assert run.outcome is Outcome.NOT_MEASURED
    assert "disturbed" in run.reason


def test_packed_models_answer_as_the_trained_ones():
    subject = ReferenceSubject()
    for task in subject.tasks():
        batch = subject.example_batch(task, batch_size=3, seed=1)
        trained = subject.build_model(task, seed=1).eval()
        packed = pack_model(trained)
        with torch.inference_mode():
            assert torch.equal(packed(batch.inputs), trained(batch.inputs))


class ContiguousOnly(ReferenceSubject):
    """Sound: kernels that refuse operands by columns."""

    def prepare_product(self, name, codes):
        if not codes.is_contiguous():
            raise TypeError("codes by columns")
        return super().prepare_product(name, codes)


def test_a_kernel_may_refuse_operands_by_columns_and_is_named(run_check):
    run = run_check("performance.kernel_against_reference", ContiguousOnly())
    assert run.outcome is Outcome.PASS, run.reason
    assert run.evidence("refuse_operands_by_columns") == len(ContiguousOnly().products())
    assert (
        run_check("performance.kernel_against_reference").evidence("refuse_operands_by_columns")
        == 0
    )


class OwnProducts(ReferenceSubject):
    """Products changed by `change(sound, codes)`."""

    def __init__(self, change):
        self.change = change

    def prepare_product(self, name, codes):
        return self.change(super().prepare_product(name, codes), codes)


def wrong_in_long_prompts(sound, codes):
    def product(q):
        y = sound(q)
        y[64:] = y[64:].roll(1, 0)
        return y

    return product


def wrong_in_long_rows(sound, codes):
    most = 8192 * 127
    return lambda q: sound(q).clamp(-most, most)


def wrong_at_the_smallest_code(sound, codes):
    def product(q):
        y = sound(q)
        return torch.where(y.abs() == 128 * q.shape[1], y - y.sign().int(), y)

    return product


@pytest.mark.parametrize(
    "change",
    [wrong_in_long_prompts, wrong_in_long_rows, wrong_at_the_smallest_code],
)
def test_kernels_are_checked_where_prompts_and_rows_are_long(run_check, change):
    run = run_check("performance.kernel_against_reference", OwnProducts(change))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "sums_that_differ is" in run.reason


def wrong_where_it_is_timed(sound, codes):
    def product(q):
        y = sound(q)
        y[-1, -1] += len(codes) == 2560
        return y

    return product


def test_the_product_that_is_timed_is_exact(run_check):
    run = run_check("performance.kernel_roofline", OwnProducts(wrong_where_it_is_timed))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "timed_sums_that_differ is" in run.reason


class KeepsAnswers(ReferenceSubject):
    """Portable products that are computed once for equal operands."""

    def prepare_product(self, name, codes):
        sound, kept = super().prepare_product("scalar", codes), []

        def product(q):
            if not kept or not torch.equal(kept[0], q):
                kept[:] = [q.clone(), sound(q)]
            return kept[1]

        return product


def test_a_product_that_keeps_answers_is_timed_without_them(run_check):
    run = run_check("performance.kernel_roofline", KeepsAnswers())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "roofline_share is" in run.reason
