"""Performance: each check goes red for a subject with one seeded defect."""

from __future__ import annotations

from collections import deque
from functools import lru_cache, partial

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


class AroundPacked(ReferenceSubject):
    """The packed model inside `around(model)`."""

    def __init__(self, around):
        self.around = around

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        return self.around(model) if form == "packed" else model


class Remembers(torch.nn.Module):
    """Slow, but for inputs it has seen before."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, {}

    def forward(self, x):
        key = x.numpy().tobytes()
        if key not in self.seen:
            for _ in range(8):
                self.seen[key] = self.model(x)
        return self.seen[key]


def test_answers_that_are_remembered_do_not_make_a_model_fast(run_check):
    run = run_check("performance.inference_speedup", AroundPacked(Remembers))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "inference_speedup is" in run.reason


class Slotted:
    __slots__ = ("held",)


def in_a_closure(model, held):
    model.register_forward_hook(lambda module, args, y: y if held else None)


def in_a_partial(model, held):
    model.register_forward_hook(partial(lambda held, module, args, y: y, held))


def in_a_bound_method(model, held):
    model.register_forward_hook(held.hook)


def in_slots(model, held):
    model.holder = Slotted()
    model.holder.held = held


def in_numpy(model, held):
    model.arrays = {name: tensor.numpy() for name, tensor in held.state_dict().items()}


def in_a_deque(model, held):
    model.queue = deque(held.parameters())


class Hooked(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def hook(self, module, args, y):
        return y


CACHE = lru_cache(maxsize=None)(lambda key: ReferenceSubject().build_model("bytes", seed=5))


def in_a_cache(model, held):
    model.register_forward_hook(lambda module, args, y: (CACHE(0), y)[1])


@pytest.mark.parametrize(
    "where",
    [
        in_a_closure,
        in_a_partial,
        in_a_bound_method,
        in_slots,
        in_numpy,
        in_a_deque,
        in_a_cache,
    ],
)
def test_weights_that_are_kept_anywhere_count(run_check, where):
    def around(model):
        latents = ReferenceSubject().build_model("bytes", seed=5)
        for parameter in latents.parameters():
            parameter.requires_grad_(False)
        where(model, Hooked(latents))
        return model

    CACHE.cache_clear()
    run = run_check("performance.compression", AroundPacked(around))
    CACHE.cache_clear()
    assert run.outcome is Outcome.FAIL, run.reason
    assert "resident_ratio is" in run.reason


class BeginsAtZero(ReferenceSubject):
    """Images alone, and an output layer of zeros: every logit of a fresh model is 0."""

    def tasks(self):
        return ("digits",)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        torch.nn.init.zeros_(model.head.weight)
        return model


def test_logits_of_zeros_leave_the_packed_model_unmeasured(run_check):
    """Any packed model says the same, whatever it computes in front of such a layer."""
    run = run_check("performance.inference_speedup", BeginsAtZero())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "digits: every logit of a fresh model is 0" in run.reason


class AnswersByName(ReferenceSubject):
    """The model that is trained answers with a mapping, as those of transformers do."""

    def tasks(self):
        return ("digits",)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        plain = model.forward
        model.forward = lambda inputs: {"loss": None, "logits": plain(inputs)}
        return model

    def inference_model(self, task, form, *, seed):
        return ReferenceSubject().inference_model(task, form, seed=seed)


def test_a_model_that_answers_with_a_mapping_is_compared(run_check):
    run = run_check("performance.inference_speedup", AnswersByName())
    assert run.outcome is not Outcome.ERROR, run.reason
    assert run.evidence("difference") <= 1e-3
    assert run.evidence("digits.difference_by_shape") <= 1 / 127
