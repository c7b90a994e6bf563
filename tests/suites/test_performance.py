"""Performance: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from forge_harness.model.packed_model import pack_model
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .training_defects import OneSetting

CHECKS = (
    "kernel_against_reference",
    "kernel_roofline",
    "inference_speedup",
    "compression",
    "peak_memory",
    "training_throughput",
)


class Small(ReferenceSubject):
    """The reference subject, with the small model as the largest: the checks take seconds."""

    def tasks(self):
        return ("digits",)


class Int16(ReferenceSubject):
    """A kernel that accumulates in int16: right on random codes, wrong on long runs."""

    def prepare_product(self, name, codes):
        def product(q):
            products = q.to(torch.int16)[:, None, :] * codes.to(torch.int16)[None]
            return products.sum(-1, dtype=torch.int16).to(torch.int32)

        return product


class ForgetsTail(ReferenceSubject):
    """A kernel that leaves out the columns beyond the last whole block of 16."""

    def prepare_product(self, name, codes):
        whole = codes.shape[1] // 16 * 16
        inner = super().prepare_product(name, codes)

        def product(q):
            q = q.clone()
            q[:, whole:] = 0
            return inner(q)

        return product


class SlowPath(ReferenceSubject):
    """Inference picked the portable path."""

    def products(self):
        return ("scalar",)


class UnpacksFirst(Small):
    """ "Packed" inference that waits before every answer."""

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        if form == "packed":
            model.register_forward_pre_hook(lambda *_: time.sleep(0.003))
        return model


class OtherModel(Small):
    """Packed inference of another model than the trained one."""

    def inference_model(self, task, form, *, seed):
        return super().inference_model(task, form, seed=seed + (form == "packed"))


class KeepsLatents(Small):
    """The packed model still holds the weights it was made from."""

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        if form == "packed":
            model.latents = self.build_model(task, seed=seed)
        return model


class DequantizedCopy(Small):
    """The packed model keeps what its weights decode to, in an attribute torch does not look at."""

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        if form == "packed":
            full = self.build_model(task, seed=seed)
            model.cache = {"weights": [w.clone() for w in self.effective_weights(full).values()]}
        return model


class DequantizesWhenCalled(Small):
    """The packed model decodes its weights at the first call and keeps them."""

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        if form == "packed":
            full = self.build_model(task, seed=seed)

            def decode(module, args):
                for index, weight in enumerate(self.effective_weights(full).values()):
                    module.register_buffer(f"decoded_{index}", weight.clone(), persistent=False)

            model.register_forward_pre_hook(decode)
        return model


class SavesFakeQuantized(ReferenceSubject):
    """Training keeps dequantized weights and activations for the backward, beside the latents."""

    def linear(self, x, weight, bias=None):
        from forge_harness.quant import TernaryLinearOp

        return TernaryLinearOp(compute="fake")(x * 1.0, weight * 1.0, bias)


class WaitsForData(OneSetting):
    """Ternary training waits for its data in every step: no CPU time, but time."""

    def session(self, task, options):
        session = super().session(task, options)
        if options.precision == "ternary":
            stepping = session.step

            def step():
                time.sleep(0.05)
                return stepping()

            session.step = step
        return session


class StepsOverHalfTheBatch(OneSetting):
    """Ternary training takes as long as ever and gets through half of the samples."""

    def session(self, task, options):
        session = super().session(task, options)
        if options.precision == "ternary":
            stepping = session.step

            def step():
                record = stepping()
                return replace(record, sample_ids=record.sample_ids[::2])

            session.step = step
        return session


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_subject_passes(run_check, check):
    run = run_check(f"performance.{check}")
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize(
    ("check", "subject", "evidence"),
    [
        ("kernel_against_reference", Int16(), "sums_that_differ"),
        ("kernel_against_reference", ForgetsTail(), "sums_that_differ"),
        ("kernel_roofline", SlowPath(), "roofline_share"),
        ("inference_speedup", UnpacksFirst(), "inference_speedup"),
        ("inference_speedup", OtherModel(), "difference"),
        ("compression", KeepsLatents(), "resident_ratio"),
        ("compression", DequantizedCopy(), "resident_ratio"),
        ("compression", DequantizesWhenCalled(), "resident_ratio"),
        ("peak_memory", SavesFakeQuantized(), "saved_ratio"),
        ("training_throughput", WaitsForData(), "throughput_ratio"),
        ("training_throughput", StepsOverHalfTheBatch(), "throughput_ratio"),
    ],
)
def test_a_defect_is_found(run_check, check, subject, evidence):
    run = run_check(f"performance.{check}", subject)
    assert run.outcome is Outcome.FAIL
    assert evidence in run.reason


def test_the_narrow_accumulator_passes_on_random_codes():
    """Why the check has directed inputs: the known-bad kernel is right nearly everywhere."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (4, 2560), generator=generator).to(torch.int8)
    codes = torch.randint(-1, 2, (64, 2560), generator=generator).to(torch.int8)
    found = Int16().prepare_product("int16", codes)(q)
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
