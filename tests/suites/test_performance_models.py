"""Performance: speed and memory of packed models, whatever they hide, keep or answer with."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import pytest
import torch

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training.ingredients import set_compute
from forge_harness.types import Outcome


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


class TwinIsTernary(ReferenceSubject):
    """What should be the full-precision twin quantizes in its forward, as the model in training."""

    def __init__(self, *tasks):
        self.named = tasks

    def tasks(self):
        return self.named

    def inference_model(self, task, form, *, seed):
        if form == "packed":
            return super().inference_model(task, form, seed=seed)
        return self.build_model(task, seed=seed).eval().requires_grad_(False)


class BranchesBeginAtZero(TwinIsTernary):
    """Sound: no ternary layer shows in a fresh model, in whatever precision."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".down.weight")):
                torch.nn.init.zeros_(parameter)
        return model


def test_a_twin_that_is_the_ternary_model_is_none(run_check):
    """It is slow, and made a packed model fast that was slower than full precision."""
    run = run_check("performance.inference_speedup", TwinIsTernary("digits"))
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "the full-precision twin answers as the ternary model does" in run.reason
    run = run_check("performance.inference_speedup", BranchesBeginAtZero("bytes"))
    assert "twin" not in run.reason


class WrongBesides(TwinIsTernary):
    def inference_model(self, task, form, *, seed):
        return super().inference_model(task, form, seed=seed + (form == "packed"))


def test_a_twin_that_is_none_hides_no_wrong_answer(run_check):
    run = run_check("performance.inference_speedup", WrongBesides("digits"))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "difference is" in run.reason


class HeldElsewhere(torch.nn.Module):
    """Answers by a model that is known by a number alone, as what a library holds is."""

    known: ClassVar = {}

    def __init__(self, model):
        super().__init__()
        self.number = id(model)
        HeldElsewhere.known[id(model)] = model

    def forward(self, x):
        return HeldElsewhere.known[self.number](x)


def test_codes_that_are_held_where_nobody_looks_leave_the_ratio_unmeasured(run_check):
    run = run_check("performance.compression", AroundPacked(HeldElsewhere))
    HeldElsewhere.known.clear()
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "shows 0 bytes that may be codes" in run.reason


class Crew:
    """Two threads of a subject's own that work during a call, whatever torch's limit is."""

    def __init__(self):
        self.on, self.block = threading.Event(), bytes(1 << 14)
        for _ in range(2):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while self.on.wait():
            hashlib.sha256(self.block)

    def around(self, call):
        def called(x):
            self.on.set()
            try:
                return call(x)
            finally:
                self.on.clear()

        return called


class Helped(torch.nn.Module):
    """Answers only at the last of so many calls of the model."""

    def __init__(self, model, calls):
        super().__init__()

        def repeated(x):
            return [model(x) for _ in range(calls)][-1]

        self.forward = Crew().around(repeated)


@pytest.mark.forge_timing  # its threads need a second core
def test_threads_of_a_models_own_count(run_check):
    """More cores than the one it may have made a model fast that is slow in one thread.

    Three threads on two cores take it down to a third, so it is called as often as leaves it twice
    as fast as full precision without them, however fast it is on this processor.
    """
    alone = run_check("performance.inference_speedup").evidence("estimate")
    helped = partial(Helped, calls=max(1, round(alone / 2)))
    run = run_check("performance.inference_speedup", AroundPacked(helped))
    assert run.outcome in (Outcome.FAIL, Outcome.NOT_MEASURED)
    assert run.evidence("estimate") < 1


@dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Answers(ReferenceSubject):
    """Trained and packed model answer with `trained(logits)` and `packed(logits)`."""

    def __init__(self, trained, packed):
        self.trained, self.packed = trained, packed

    def tasks(self):
        return ("digits",)

    def build_model(self, task, *, seed):
        return changed(super().build_model(task, seed=seed), self.trained)

    def inference_model(self, task, form, *, seed):
        model = ReferenceSubject().inference_model(task, form, seed=seed)
        return changed(model, self.packed) if form == "packed" else model


def changed(model, change):
    plain = model.forward
    model.forward = lambda inputs: change(plain(inputs))
    return model


def with_rows_of_zeros(logits):
    return logits * (logits[..., :1] > 0)


@pytest.mark.parametrize(
    ("trained", "packed"),
    [
        (partial(Answer, None), lambda logits: logits),
        (with_rows_of_zeros, with_rows_of_zeros),
    ],
    ids=["dataclass", "rows_of_zeros"],
)
def test_answers_of_any_sound_form_are_compared(run_check, trained, packed):
    run = run_check("performance.inference_speedup", Answers(trained, packed))
    assert run.outcome is not Outcome.ERROR, run.reason
    assert run.evidence("digits.difference_by_shape") <= 1 / 127


def test_a_row_that_should_be_zeros_and_is_not_differs(run_check):
    subject = Answers(with_rows_of_zeros, lambda y: with_rows_of_zeros(y) + 1e-4 * (y[:, :1] <= 0))
    run = run_check("performance.inference_speedup", subject)
    assert run.outcome is Outcome.FAIL, run.reason
    assert "difference_by_shape is inf" in run.reason


def test_answers_of_another_shape_differ(run_check):
    run = run_check("performance.inference_speedup", Answers(lambda y: y, lambda y: y[:, :3]))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "difference is inf" in run.reason


class Unpacks(AroundPacked):
    """Unpacks its weights for the first input of which `many` is true, and keeps them."""

    def __init__(self, task, many):
        self.task, self.many = task, many

    def tasks(self):
        return (self.task,)

    def around(self, model):
        unpacked, plain = [], model.forward

        def forward(inputs):
            if self.many(inputs) and not unpacked:
                unpacked.extend(ReferenceSubject().build_model(self.task, seed=5).parameters())
            return plain(inputs)

        model.forward = forward
        return model


@pytest.mark.parametrize(
    ("task", "many"),
    [("digits", lambda inputs: len(inputs) > 8), ("bytes", lambda inputs: inputs.shape[1] == 1)],
)
def test_weights_that_are_unpacked_for_some_inputs_count(run_check, task, many):
    run = run_check("performance.compression", Unpacks(task, many))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "resident_ratio is" in run.reason


class TwinInBuffers(ReferenceSubject):
    """Sound: what the full-precision twin multiplies by are buffers, of the given type."""

    def __init__(self, dtype):
        self.dtype = dtype

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, form, seed=seed)
        for module in model.modules() if form == "full" else ():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach().to(self.dtype))
        return model


def test_a_twin_may_hold_its_weights_in_buffers(run_check):
    run = run_check("performance.compression", TwinInBuffers(torch.float32))
    assert run.outcome is Outcome.PASS, run.reason
    run = run_check("performance.compression", TwinInBuffers(torch.float64))
    assert "full_bytes_per_parameter is 8" in run.reason


class NamesNoTask(ReferenceSubject):
    def tasks(self):
        return ()


@pytest.mark.parametrize("check", ["inference_speedup", "compression", "training_overhead"])
def test_a_subject_without_tasks_is_not_measured(run_check, check):
    run = run_check(f"performance.{check}", NamesNoTask())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "does not name its tasks" in run.reason


class MultipliesDequantized(ReferenceSubject):
    """Deployed in fp32: the sums of its products are rounded, and codes behind them flip."""

    def inference_model(self, task, form, *, seed):
        model = super().inference_model(task, "full", seed=seed)
        if form == "packed":
            model = self.build_model(task, seed=seed).eval()
            assert set_compute(model, "fake")
        return model


def test_codes_that_roundings_flip_are_no_other_model(run_check):
    run = run_check("performance.inference_speedup", MultipliesDequantized())
    assert "difference" not in run.reason
    assert run.evidence("bytes.difference_by_shape") > 1 / 127
    assert run.evidence("bytes.typical_difference") < 1e-5
