"""The reference subject: overriding a method reaches the models and sessions it makes."""

import copy

import pytest
import torch

from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject


class Doubled(ReferenceSubject):
    def quantize_weight(self, weight):
        codes, scale = super().quantize_weight(weight)
        return codes, scale * 2


class Tripled(ReferenceSubject):
    def linear(self, x, weight, bias=None):
        return 3 * super().linear(x, weight, bias)


@pytest.fixture(scope="module")
def batch():
    return ReferenceSubject().example_batch("digits", batch_size=4, seed=0)


def logits(subject, batch):
    return subject.build_model("digits", seed=0)(batch.inputs)


@pytest.mark.parametrize("broken", [Doubled, Tripled])
def test_an_override_changes_what_models_compute(broken, batch):
    assert not torch.equal(logits(ReferenceSubject(), batch), logits(broken(), batch))


def test_an_override_changes_the_effective_weights():
    plain, doubled = ReferenceSubject(), Doubled()
    expected = plain.effective_weights(plain.build_model("digits", seed=0))
    found = doubled.effective_weights(doubled.build_model("digits", seed=0))
    assert all(torch.equal(found[name], 2 * expected[name]) for name in expected)


def test_a_replaced_method_of_the_object_counts_too(batch):
    subject = ReferenceSubject()
    before = logits(subject, batch)
    subject.linear = lambda x, w, b=None: torch.zeros(*x.shape[:-1], w.shape[0])
    assert not torch.equal(before, logits(subject, batch))


def test_an_override_reaches_training():
    options = TrainOptions(seed=0, steps=2)
    losses = {
        kind: kind().session("digits", options).step().loss for kind in (ReferenceSubject, Doubled)
    }
    assert losses[ReferenceSubject] != losses[Doubled]


def test_the_full_precision_arm_is_not_touched_by_quantizer_overrides():
    options = TrainOptions(seed=0, steps=2, precision="full")
    losses = {
        kind: kind().session("digits", options).step().loss for kind in (ReferenceSubject, Doubled)
    }
    assert losses[ReferenceSubject] == losses[Doubled]


def test_overridden_data_reaches_training():
    class FirstOnly(ReferenceSubject):
        def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
            return list(super().epoch_order(task, seed=0, epoch=0))

    record = FirstOnly().session("digits", TrainOptions(seed=3, steps=2)).step()
    expected = ReferenceSubject().epoch_order("digits", seed=0, epoch=0)[: len(record.sample_ids)]
    assert list(record.sample_ids) == list(expected)


def test_the_declaration_does_not_follow_an_overridden_model():
    class Wrong(ReferenceSubject):
        def build_model(self, task, *, seed):
            return torch.nn.Linear(64, 10)

    assert Wrong().model_spec("digits") == ReferenceSubject().model_spec("digits")


def test_copying_a_model_does_not_copy_the_subject():
    subject = Tripled()
    clone = copy.deepcopy(subject.build_model("digits", seed=0))
    assert clone.stem.linear.__self__ is subject


@pytest.mark.parametrize("task", ReferenceSubject().tasks())
def test_parameter_count_equals_the_declared_formula(task):
    subject = ReferenceSubject()
    spec = subject.model_spec(task)
    model = subject.build_model(task, seed=0)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters <= spec.max_parameters


def test_an_override_reaches_the_ranks_of_a_distributed_run():
    options = TrainOptions(seed=0, steps=2, accumulation=2)
    session = Doubled().session("digits", options)
    for _ in range(2):
        session.step()
    found = Doubled().train_distributed("digits", options, ranks=2)
    assert all(torch.equal(found[k], v) for k, v in session.model.state_dict().items())


def test_a_subclass_is_not_called_the_reference():
    class Own(ReferenceSubject):
        pass

    class Named(ReferenceSubject):
        name = "acme"

    class Later(Named):
        pass

    assert (Own().name, Named().name, Later().name) == ("Own", "acme", "acme")
    assert ReferenceSubject().name == "reference"
