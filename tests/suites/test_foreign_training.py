"""Trainers that are not the reference's: samples drawn anew with each read."""

import importlib.util
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch

from forge_harness.protocols import Batch
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

MASK, UNKNOWN = 0, -100
HELD_TO_AUTOGRAD = ("training.accumulation_equivalence", "training.partial_window")


class Augmented(foreign.Words):
    """Some tokens of what is trained on are replaced, others with each read; targets are not."""

    share = 0.1

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        if split == "validation":
            return batch
        chosen = torch.rand(batch.inputs.shape) < self.share
        return replace(batch, inputs=batch.inputs.masked_fill(chosen, MASK))


class ByTheirCount(foreign.Loop):
    """Divides by the micro-batches, whatever is in them."""

    def losses(self, ids):
        whole = replace(self.options, accumulation=1)
        size = -(-len(ids) // self.options.accumulation)
        self.options, kept = whole, self.options
        for start in range(0, len(ids), size):
            (loss,) = super().losses(ids[start : start + size])
            yield loss / kept.accumulation
        self.options = kept


class AugmentedByTheirCount(Augmented):
    loop = ByTheirCount


class Distilled(Augmented):
    """Another model, which no step trains, has the samples that the session's model has."""

    def loss(self, model, batch):
        logits = model(batch.inputs).flatten(0, -2)
        with torch.no_grad():
            wanted = self.teacher(batch.inputs).flatten(0, -2).softmax(-1)
        of_teacher = torch.nn.functional.cross_entropy(logits, wanted)
        return (of_teacher + torch.nn.functional.cross_entropy(logits, batch.targets.flatten())) / 2

    @cached_property
    def teacher(self):
        model = self.build_model("words", seed=99).requires_grad_(False)
        model.head.weight.mul_(20.0)
        return model


class DistilledByTheirCount(Distilled):
    loop = ByTheirCount


class Drowned(Augmented):
    """Hardly anything is left of a sample: nobody can learn it by heart."""

    share = 0.95


class Masked(foreign.Words):
    """A masked language model: which tokens are targets is drawn with each read."""

    ignored = UNKNOWN

    def model_spec(self, task):
        return replace(super().model_spec(task), causal=False)

    def batch(self, task, split, ids):
        inputs = super().batch(task, split, ids).inputs
        chosen = torch.rand(inputs.shape) < 0.2
        targets = inputs.masked_fill(~chosen, UNKNOWN)
        return Batch(inputs=inputs.masked_fill(chosen, MASK), targets=targets)


class SmallNet(foreign.Net):
    def forward(self, ids):
        full = next(m.full for m in self.modules() if isinstance(m, foreign.BitLayer))
        return super().forward(ids) * (1.0 if full else 1e-7)


class LearnsNothing(Augmented):
    """Full precision learns; ternary outputs are next to nothing."""

    net = SmallNet


class DescendsAnother(Drowned):
    """A loss of the loop's own, as that of mixed labels is."""

    class loop(foreign.Loop):
        def losses(self, ids):
            for loss in super().losses(ids):
                yield loss + 0.1 * loss.square()


class OfTheNeighbour(Augmented):
    """The loop trains on the inputs of another sample, and the targets of this one."""

    class loop(foreign.Loop):
        def losses(self, ids):
            batch = self.subject.batch("words", "train", ids)
            inputs = batch.inputs.roll(1, 0)
            yield self.subject.loss(self.model, replace(batch, inputs=inputs))


@pytest.mark.parametrize("check", [*HELD_TO_AUTOGRAD, "training.overfit_one_batch"])
def test_augmented_samples_are_no_false_alarm(run_check, check):
    run = run_check(check, Augmented())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize("check", HELD_TO_AUTOGRAD)
def test_a_teacher_has_the_augmented_samples_too(run_check, check):
    """It had those of another read in the oracle: distillation was red."""
    run = run_check(check, Distilled())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "reason"),
    [
        (AugmentedByTheirCount, HELD_TO_AUTOGRAD[0], "gradient_difference_4 is"),
        (AugmentedByTheirCount, HELD_TO_AUTOGRAD[1], "gradient_difference is"),
        (DistilledByTheirCount, HELD_TO_AUTOGRAD[0], "gradient_difference_4 is"),
        (OfTheNeighbour, HELD_TO_AUTOGRAD[0], "own_samples_1 is"),
        (LearnsNothing, "training.overfit_one_batch", "loss_ratio is"),
    ],
)
def test_augmentation_hides_no_defect(run_check, subject, check, reason):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith(reason)


@pytest.mark.parametrize(
    ("subject", "check", "reason"),
    [
        (Masked, HELD_TO_AUTOGRAD[0], "which targets a step had does not show"),
        (Drowned, "training.overfit_one_batch", "full precision does not learn 2 samples"),
        (DescendsAnother, "training.overfit_one_batch", "of the answers are right"),
    ],
)
def test_what_nobody_can_tell_of_samples_drawn_anew_is_not_measured(
    run_check, subject, check, reason
):
    run = run_check(check, subject())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "training samples of words are drawn anew with each" in run.reason
    assert reason in run.reason


class RateInATensor(foreign.Words):
    """As torch recommends for a compiled optimizer."""

    def optimizer(self, model):
        return torch.optim.AdamW(self.groups(model), lr=torch.tensor(1e-3), betas=(0.9, 0.95))

    class loop(foreign.Loop):
        def step(self):
            plan = self.plan[self.step_index]
            rate = torch.tensor(plan.learning_rate)
            self.plan[self.step_index] = replace(plan, learning_rate=rate)
            record = super().step()
            return replace(record, learning_rate=float(rate))


class RateOffInATensor(RateInATensor):
    class loop(RateInATensor.loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.plan = [replace(p, learning_rate=p.learning_rate * (1 + 1e-6)) for p in self.plan]


def test_a_rate_in_a_tensor_is_held_to_what_the_tensor_keeps(run_check):
    run = run_check("training.schedule_trace", RateInATensor())
    assert run.outcome is Outcome.PASS, run.reason
    run = run_check("training.schedule_trace", RateOffInATensor())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "words.report_error is" in run.reason


class OwnBatches(foreign.Words):
    """Steps of 13 samples whatever is asked for: 1.6 epochs where a check wants three."""

    own, repeats = 13, False

    class loop(foreign.Loop):
        def next_ids(self):
            self.options = replace(self.options, batch_size=self.subject.own)
            return super().next_ids()

    def epoch_order(self, task, *, seed, epoch, **of_ranks):
        # A loop counts its epochs by steps, so that zero is the first of them only.
        first = self.repeats and not of_ranks and seed == 3 and epoch > 2
        return super().epoch_order(task, seed=seed, epoch=0 if first else epoch, **of_ranks)


class RepeatsAnEpoch(OwnBatches):
    repeats = True


class OfFew(OwnBatches):
    own = 4


@pytest.mark.parametrize(
    ("subject", "outcome", "reason"),
    [
        (OwnBatches, Outcome.PASS, ""),
        (RepeatsAnEpoch, Outcome.FAIL, "words_session_epochs_differ is False"),
        (OfFew, Outcome.NOT_MEASURED, "delivered 96 samples, 0 of them after its first 96"),
    ],
)
def test_epochs_are_compared_as_far_as_a_session_goes(run_check, subject, outcome, reason):
    run = run_check("data.loader_order", subject())
    assert run.outcome is outcome, run.reason
    assert reason in run.reason


class RandomWindows(foreign.Words):
    """Windows of a long text, which begin anywhere in it: drawn with replacement."""

    size = 30_000

    class loop(foreign.Loop):
        def next_ids(self):
            place = self.subject.drawn_at(self.step_index)
            generator = torch.Generator().manual_seed(1000 * self.options.seed + place)
            return torch.randint(self.subject.size, (16,), generator=generator).tolist()

    def drawn_at(self, step):
        return step

    def data_info(self, task):
        return replace(super().data_info(task), train_size=self.size)

    def sample_contents(self, task, split, ids):
        known = len(foreign.SPLITS[split][1])
        return super().sample_contents(task, split, [index % known for index in ids])


class SeededAnew(RandomWindows):
    """The sampler is seeded in each step, so that all of them have the same samples."""

    def drawn_at(self, step):
        return 0


def test_a_long_text_is_not_trained_on_one_batch(run_check):
    run = run_check("data.loader_order", RandomWindows())
    assert run.outcome is Outcome.PASS, run.reason
    run = run_check("data.loader_order", SeededAnew())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith("words_session_repeated is 304 samples")


class Biased(foreign.BitLayer):
    def __init__(self, inputs, outputs, generator):
        super().__init__(inputs, outputs, generator)
        self.bias = torch.nn.Parameter(torch.rand(outputs, generator=generator) - 0.5)

    def forward(self, x):
        return super().forward(x) + self.bias


class BiasedKeys(foreign.Words):
    """Keys have biases, as BERT's: a softmax takes what they add away."""

    biased, rate = "k", 1.0

    def schedule_spec(self, task, options):
        return super().schedule_spec(task, replace(options, learning_rate=5e-5))

    def build_model(self, task, *, seed):
        model, generator = super().build_model(task, seed=seed), torch.Generator().manual_seed(seed)
        for block in model.blocks:
            shape = foreign.SHAPES[self.biased]
            block.add_module(self.biased, Biased(*shape, generator))
        return model

    def optimizer(self, model):
        optimizer = torch.optim.AdamW(self.groups(model), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
        biases = [getattr(block, self.biased).bias for block in model.blocks]

        def shrink(*_):
            for bias in biases:
                bias.grad *= self.rate

        optimizer.register_step_pre_hook(shrink)
        return optimizer


class BiasedValuesStandStill(BiasedKeys):
    """Biases that the loss depends on, and gradients that are lost on their way."""

    biased, rate = "v", 0.0


def test_what_the_loss_does_not_depend_on_need_not_move(run_check):
    """Biases of keys were said to be moved by nothing but decay: a critical check was red."""
    run = run_check("training.parameters_move", BiasedKeys())
    assert run.outcome is Outcome.PASS, run.reason
    run = run_check("training.parameters_move", BiasedValuesStandStill())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "parameters_only_decaying is 2 parameters" in run.reason
    assert "blocks.0.v.bias" in run.reason


class DrawsFromTheProcess(Augmented):
    """Its samples are augmented by the generator that all code of the process shares."""

    class loop(foreign.Loop):
        def evaluate(self):
            return {"loss": 0.0}


class KeepsItsGenerator(DrawsFromTheProcess):
    class loop(DrawsFromTheProcess.loop):
        drawn = torch.Generator().manual_seed(1).get_state()

        def step(self):
            with torch.random.fork_rng([]):
                torch.set_rng_state(self.drawn)
                record = super().step()
                self.drawn = torch.get_rng_state()
            return record


def test_a_run_that_draws_from_the_process_is_told_what_to_keep(run_check):
    run = run_check("training.repeat_bit_identical", DrawsFromTheProcess())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "a session that draws from them keeps their states" in run.reason
    run = run_check("training.repeat_bit_identical", KeepsItsGenerator())
    assert run.outcome is Outcome.PASS, run.reason
