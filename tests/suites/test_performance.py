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
def test_the_reference_subject_passes(run_check, check):
    run = run_check(f"performance.{check}")
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_a_defect_is_found(run_check, defect):
    run = run_check(defect.check, defect.subject())
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
