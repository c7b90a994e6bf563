"""Sound models whose outputs, layers or targets are of another shape than the reference's."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.protocols import Batch, DataInfo
from forge_harness.types import Outcome


def _loaded(name):
    path = Path(__file__).parents[1] / "subject" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


foreign = _loaded("foreign_language_model")
points = _loaded("foreign_subject")
square = _loaded("foreign_language_model")
square.LENGTH = square.VOCABULARY
square.SPLITS = {
    split: (documents, [w for w in square.windows(seed, 64)[1] if len(w) > square.LENGTH])
    for seed, (split, (documents, _)) in enumerate(square.SPLITS.items())
}


class TokensTogether(foreign.Words):
    """Logits of all tokens of all samples in one dimension, as a cross-entropy takes them."""

    class net(foreign.Net):
        def forward(self, ids):
            return super().forward(ids).flatten(0, 1)


class TokensLast(foreign.Words):
    """Logits as (batch, vocabulary, tokens), which a cross-entropy takes as well."""

    class net(foreign.Net):
        def forward(self, ids):
            return super().forward(ids).transpose(1, 2)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.inputs), batch.targets)


class TokensTogetherAsTheyAre(TokensTogether):
    """The loss takes what the model returns, and would not take it in another shape."""

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.inputs), batch.targets.flatten())


class AsManyLogitsAsTokens(square.Words):
    """(batch, vocabulary, tokens), and the last two are alike: which is which does not show."""

    class net(square.Net):
        def forward(self, ids):
            return super().forward(ids).transpose(1, 2)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.inputs), batch.targets)


class SeesTheNextOfAsMany(AsManyLogitsAsTokens):
    class net(AsManyLogitsAsTokens.net):
        def placed(self, ids):
            return super().placed(ids) + 0.1 * self.embed(ids.roll(-1, 1))


class OfTheNeighbour(AsManyLogitsAsTokens):
    """Holds each output against the target in front of its own."""

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.inputs), batch.targets.roll(1, 1))


class LearnsNothing(AsManyLogitsAsTokens):
    class loop(square.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            for step in self.plan:
                object.__setattr__(step, "learning_rate", 1e-6)


class SeesTheNext(TokensTogether):
    """Positions are told what comes after them."""

    class net(TokensTogether.net):
        def placed(self, ids):
            return super().placed(ids) + 0.1 * self.embed(ids.roll(-1, 1))


class TokensFirst(foreign.Words):
    class net(foreign.Net):
        def forward(self, ids):
            return super().forward(ids).transpose(0, 1)

    def loss(self, model, batch):
        logits = model(batch.inputs).transpose(0, 1).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten())


class ScaleOfTheBatch(TokensFirst):
    """A layer takes the largest value of all samples into account."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.blocks[0].q.register_forward_hook(_with_the_largest)
        return model


def _with_the_largest(module, arguments, output):
    return output + 0.01 * output.abs().amax()


class Contrastive(points.Blobs):
    """How alike each sample is to each other one, as two towers of one shape see them."""

    class net(points.Net):
        def forward(self, x):
            one, other = (F.normalize(super(type(self), self).forward(v)) for v in (x, x.flip(1)))
            return 10 * one @ other.T

    def build_model(self, task, *, seed):
        return self.net(seed)

    def loss(self, model, batch):
        alike = model(batch.inputs)
        return F.cross_entropy(alike, torch.arange(len(alike)))


class ContrastiveWithoutTargets(Contrastive):
    """Targets, of which the loss reads none, are all the same."""

    def example_batch(self, task, *, batch_size, seed):
        batch = super().example_batch(task, batch_size=batch_size, seed=seed)
        return dataclasses.replace(batch, targets=torch.zeros_like(batch.targets))


class OneTower(Contrastive):
    """Each sample is as alike to itself as can be, whatever it is."""

    class net(points.Net):
        def forward(self, x):
            seen = F.normalize(super().forward(x))
            return 10 * seen @ seen.T


class ContrastiveOfTheBatch(Contrastive):
    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.down.register_forward_hook(_with_the_largest)
        return model


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class AnswersWithADataclass(foreign.Words):
    class net(foreign.Net):
        def forward(self, ids):
            return Output(None, super().forward(ids))

    def loss(self, model, batch):
        logits = model(batch.inputs).logits.flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten())


class OneBlockTwice(foreign.Words):
    """The second block is the first: its layers have two names, and are called twice."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.blocks[1] = model.blocks[0]
        return model

    def model_spec(self, task):
        parameters = sum(p.numel() for p in self.build_model(task, seed=0).parameters())
        return dataclasses.replace(super().model_spec(task), parameters=parameters)


class CarriesItsState(foreign.Words):
    """What one batch leaves is added to the next one, as truncated backpropagation has it."""

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.register_buffer("carried", torch.zeros(foreign.WIDTH))

        def placed(self, ids):
            x = super().placed(ids)
            if not self.training:
                return x
            before, self.carried = self.carried, x.detach()[:, -1].mean(0)
            return x + before


class CarriesIntoWhatItHas(CarriesItsState):
    """In place, and in a place that is there from the second batch on."""

    class net(CarriesItsState.net):
        def __init__(self, seed):
            super().__init__(seed)
            self.register_buffer("last", None)

        def placed(self, ids):
            x = foreign.Net.placed(self, ids)
            if not self.training:
                return x
            x = x + self.carried + (0.0 if self.last is None else self.last)
            self.last = x.detach()[:, -1].mean(0)
            self.carried.copy_(self.last)
            return x


class CarriesInEvaluation(CarriesItsState):
    class net(CarriesItsState.net):
        def placed(self, ids):
            x = foreign.Net.placed(self, ids)
            before, self.carried = self.carried, x.detach()[:, -1].mean(0)
            return x + before


class NothingToPredict(points.Blobs):
    """Inputs are what is learned; targets are of no use, and all the same."""

    def example_batch(self, task, *, batch_size, seed):
        batch = super().example_batch(task, batch_size=batch_size, seed=seed)
        return dataclasses.replace(batch, targets=torch.zeros_like(batch.targets))

    def loss(self, model, batch):
        return F.mse_loss(model(batch.inputs), batch.inputs[:, :2])


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        (TokensTogether, "architecture.causal_mask"),
        (TokensLast, "architecture.causal_mask"),
        (TokensTogetherAsTheyAre, "training.overfit_one_batch"),
        (TokensFirst, "architecture.activation_scale"),
        (TokensFirst, "training.gradient_reaches_all"),
        (AsManyLogitsAsTokens, "architecture.causal_mask"),
        (AsManyLogitsAsTokens, "training.gradient_reaches_all"),
        (Contrastive, "architecture.activation_scale"),
        (ContrastiveWithoutTargets, "training.gradient_reaches_all"),
        (OneTower, "architecture.activation_scale"),
        (AnswersWithADataclass, "architecture.activation_scale"),
        (AnswersWithADataclass, "architecture.causal_mask"),
        (OneBlockTwice, "training.ste_input_gradient"),
        (OneBlockTwice, "training.ste_weight_gradient"),
        (CarriesItsState, "architecture.causal_mask"),
        (CarriesIntoWhatItHas, "architecture.causal_mask"),
        (CarriesItsState, "architecture.state_dict_round_trip"),
        (CarriesItsState, "architecture.sub_norm_present"),
        (NothingToPredict, "training.gradient_reaches_all"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_sound_model_of_another_shape_is_no_false_alarm(run_check, subject, check):
    run = run_check(check, subject())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "reason"),
    [
        (SeesTheNext, "architecture.causal_mask", "words.leak is"),
        (CarriesInEvaluation, "architecture.causal_mask", "words.leak is"),
        (SeesTheNextOfAsMany, "architecture.causal_mask", "words.leak is"),
        (OfTheNeighbour, "training.gradient_reaches_all", "words.target_elsewhere is"),
        (Contrastive, "training.gradient_reaches_all", "a loss that reads none"),
        (LearnsNothing, "training.overfit_one_batch", "above the least there is, 0,"),
        (ScaleOfTheBatch, "architecture.activation_scale", "words.moved_by_mates is"),
        (ContrastiveOfTheBatch, "architecture.activation_scale", "blobs.moved_by_mates is"),
    ],
)
def test_a_defect_shows_in_outputs_of_another_shape(run_check, subject, check, reason):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert reason in run.reason


def test_outputs_that_are_of_no_token_are_not_measured(run_check):
    run = run_check("architecture.causal_mask", TokensFirst())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "(48, 2, 128) of inputs (2, 48)" in run.reason


class ScalesTheEstimator(OneBlockTwice):
    """Gradients of the shared layers' weights are twice what they should be."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for name in foreign.SHAPES:
            model.blocks[0].get_submodule(name).weight.register_hook(lambda gradient: 2 * gradient)
        return model


def test_gradients_of_a_layer_with_two_names_are_held(run_check):
    run = run_check("training.ste_weight_gradient", ScalesTheEstimator())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "words.layer_error is" in run.reason


class TernaryPositions(foreign.Words):
    """The model holds its positions itself, makes them ternary, and drops out behind them."""

    full_precision = ("embed", "", "head")

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            table = self.positions.weight
            del self.positions
            self.positions = nn.Parameter(table.detach())

        def placed(self, ids):
            codes, scale = foreign.weight_codes(self.positions)
            table = self.positions + (codes * scale - self.positions).detach()
            return F.dropout(self.embed(ids) + table[: ids.shape[1]], 0.1, self.training)


def test_masks_of_dropout_are_no_response_of_full_precision(run_check):
    run = run_check("architecture.quantized_modules", TernaryPositions())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "words.the model.response is 0" in run.reason


class OneLogit(points.Blobs):
    """A classifier of two classes with one logit; offers LoadsData too."""

    samples = 512

    def build_model(self, task, *, seed):
        model = points.Net(seed)
        model.down = points.BitLayer(32, 1, torch.Generator().manual_seed(seed + 1))
        return model

    def model_spec(self, task):
        return dataclasses.replace(super().model_spec(task), parameters=8 * 32 + 32)

    def loss(self, model, batch):
        logits = model(batch.inputs).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, batch.targets.float())

    def data_info(self, task):
        return DataInfo(
            kind="classes",
            cardinality=2,
            train_size=self.samples,
            validation_size=self.samples,
            digest=self.data_digest(task),
            input_dtype="float32",
        )

    def batch(self, task, split, ids):
        seed = 0 if split == "train" else 1
        data = self.example_batch(task, batch_size=self.samples, seed=seed)
        return Batch(inputs=data.inputs[list(ids)], targets=data.targets[list(ids)])

    def data_digest(self, task):
        return "sha256:" + "0" * 64

    def documents(self, task, split):
        return self.sample_contents(task, split, range(self.samples))

    def sample_contents(self, task, split, ids):
        return [row.numpy().tobytes() for row in self.batch(task, split, ids).inputs]

    def labels(self, task, split):
        return self.batch(task, split, range(self.samples)).targets.tolist()

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        return list(range(self.samples))[rank::world_size]


class SmoothsInItsSession(OneLogit):
    """One logit a sample, in a tuple; the session descends smoothed targets."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.register_forward_hook(lambda module, arguments, output: (output.squeeze(-1),))
        return model

    def loss(self, model, batch, smoothed=0.0):
        targets = batch.targets.float() * (1 - smoothed) + smoothed / 2
        return F.binary_cross_entropy_with_logits(model(batch.inputs)[0], targets)

    class loop(points.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.subject = self

        def loss(self, model, batch):
            return SmoothsInItsSession().loss(model, batch, smoothed=0.1)

    def session(self, task, options):
        return self.loop(self, options)


def test_answers_that_outputs_do_not_say_are_not_measured(run_check):
    run = run_check("training.overfit_one_batch", SmoothsInItsSession())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "which answers the model of blobs gives does not show" in run.reason


class LearnsLittle(OneLogit):
    """Steps are so small that a tenth of the loss is left at no rate."""

    class loop(points.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            for step in self.plan:
                object.__setattr__(step, "learning_rate", 2e-4)

    def session(self, task, options):
        return self.loop(self, options)


def test_one_logit_of_two_classes_has_a_least_loss_of_zero(run_check):
    run = run_check("training.overfit_one_batch", OneLogit())
    assert run.outcome is Outcome.PASS, run.reason
    assert 0 <= run.evidence("loss_ratio") <= 0.05
    run = run_check("training.overfit_one_batch", LearnsLittle())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "loss_ratio is" in run.reason
