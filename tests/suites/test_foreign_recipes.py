"""Sound recipes that are not the reference's: no check is red, and one that cannot tell says so."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.drill.defects.sound_training import Averages, AveragingSession
from forge_harness.protocols import Batch, ScheduleStep
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)


class AmsGrad(foreign.Words):
    def optimizer(self, model):
        return torch.optim.AdamW(self.groups(model), lr=1e-3, amsgrad=True)


class HeadDecaysLess(foreign.Words):
    def groups(self, model):
        decay, rest = super().groups(model)
        matrices = [p for p in decay["params"] if p is not model.head.weight]
        return [{"params": matrices}, {"params": [model.head.weight], "decays": 0.1}, rest]


class Nesterov(foreign.Words):
    def optimizer(self, model):
        return torch.optim.SGD(self.groups(model), lr=0.1, momentum=0.9, nesterov=True)


class FromZero(foreign.Words):
    """The warmup of transformers: the first step has a rate of 0."""

    def schedule_spec(self, task, options):
        return replace(super().schedule_spec(task, options), kind="linear_from_zero")

    def planned_schedule(self, task, options):
        plan = super().planned_schedule(task, options)
        return [ScheduleStep(learning_rate=0.0, weight_decay=0.1), *plan[:-1]]


class NesterovFromZero(Nesterov, FromZero):
    pass


class WithoutDecay(foreign.Words):
    def schedule_spec(self, task, options):
        return replace(super().schedule_spec(task, options), weight_decay=0.0)


class DecaysUnplanned(WithoutDecay):
    class loop(foreign.Loop):
        def step(self):
            for group in self.optimizer.param_groups:
                group["decays"] = 1.0
            self.plan = [replace(step, weight_decay=0.1) for step in self.plan]
            return super().step()


class Lamb(torch.optim.Optimizer):
    """Updates of the norm of their weight (arXiv 1904.00962)."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad.square(), 0.001)
                update = state["m"] / (state["v"].sqrt() + 1e-6) + group["weight_decay"] * p
                ratio = p.norm() / update.norm() if group["weight_decay"] else 1.0
                p.sub_(group["lr"] * ratio * update)


class WithLamb(foreign.Words):
    def optimizer(self, model):
        return Lamb(self.groups(model))


class Scaled(foreign.Words):
    """A loss scale, taken off before the gradients are clipped."""

    loss_scale = 4096.0


class Halved(foreign.Words):
    """Gradients are halved, as where a mean is taken twice; nobody scales a loss by so little."""

    loss_scale = 2.0


class FrozenAtFirst(foreign.Words):
    """Embeddings are frozen for the first half; the optimizer holds them all along."""

    class loop(foreign.Loop):
        def step(self):
            frozen = self.step_index < len(self.plan) // 2
            self.model.embed.weight.requires_grad_(not frozen)
            return super().step()

        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.model.embed.weight.requires_grad_(False)


class ForgottenWhenThawed(FrozenAtFirst):
    """Their optimizer was made of what was trainable when it was made."""

    def optimizer(self, model):
        groups = self.groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not model.embed.weight]
        return torch.optim.AdamW(groups, lr=1e-3)


class SkipsLayers(foreign.Words):
    class net(foreign.Net):
        def through(self, block, x):
            return x if self.training and torch.rand(()) < 0.4 else block(x)


class ZeroHead(foreign.Words):
    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            nn.init.zeros_(self.head.weight)


class ZeroBranches(foreign.Words):
    """Each block begins as the identity (ReZero, arXiv 2003.04887)."""

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            for block in self.blocks:
                block.alpha = nn.Parameter(torch.zeros(()))

        def through(self, block, x):
            return x + block.alpha * (block(x) - x)

    def model_spec(self, task):
        spec = super().model_spec(task)
        return replace(spec, parameters=spec.parameters + foreign.DEPTH)


class Experts(foreign.Words):
    """Every sequence goes through the block that its first token chooses, and through no other."""

    class net(foreign.Net):
        def forward(self, ids):
            x, blocks = self.placed(ids), ids[:, 0] % len(self.blocks)
            rows = [(block, blocks == number) for number, block in enumerate(self.blocks)]
            parts = [(chosen, block(x[chosen])) for block, chosen in rows if chosen.any()]
            y = torch.zeros_like(x)
            for chosen, part in parts:
                y = y.index_put((chosen,), part)
            return self.head(self.norm(y))


class OfOneExpert(Experts):
    """Sessions of batches of one sample, so that most steps leave an expert out."""

    def session(self, task, options):
        return super().session(task, replace(options, batch_size=1))


class ReadsWeight(foreign.Words):
    """Positions are read from their table's weight: the module itself is never called."""

    class net(foreign.Net):
        def placed(self, ids):
            return self.embed(ids) + self.positions.weight[: ids.shape[1]]


class HoldsPositions(foreign.Words):
    """Positions are a parameter of the model itself, which it declares by its name, ''."""

    full_precision = ("embed", "", "head")

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            table = self.positions.weight.detach().clone()
            del self.positions
            self.positions = nn.Parameter(table)

        def placed(self, ids):
            return self.embed(ids) + self.positions[: ids.shape[1]]


class HidesPositions(HoldsPositions):
    full_precision = ("embed", "head")


class Autocast(foreign.Words):
    def loss(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch.inputs)
        return F.cross_entropy(logits.float().flatten(0, -2), batch.targets.flatten())


class AutocastOutside(foreign.Words):
    """The loop puts an autocast around the loss, which asks for none itself."""

    class loop(foreign.Loop):
        def losses(self, ids):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield from super().losses(ids)


class InBf16(foreign.Words):
    """Weights, gradients and activations are all in bf16."""

    def build_model(self, task, *, seed):
        return super().build_model(task, seed=seed).bfloat16()


class BetweenTwoRates(foreign.Words):
    """At three times the peak rate full precision learns two samples, and ternary weights do not.

    They do at ten times.
    """

    def schedule_spec(self, task, options):
        return super().schedule_spec(
            task, replace(options, learning_rate=options.learning_rate or 1.5e-3)
        )


class MadeForLongRuns(foreign.Words):
    """A peak rate at which full precision does not learn two samples in 60 steps either."""

    def schedule_spec(self, task, options):
        return super().schedule_spec(
            task, replace(options, learning_rate=options.learning_rate or 1e-3)
        )


class DrawnSmall(foreign.Words):
    """Weights as Hugging Face draws them, tied: neither arm learns in 60 steps, at any rate."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.head.weight = model.embed.weight
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.02 / parameter.std())
        return model


class Padded(foreign.Words):
    """Lines of unequal length, padded to the longest of their batch; the last token is no input."""

    ignored = -100

    def sample_contents(self, task, split, ids):
        whole = super().sample_contents(task, split, ids)
        return [text[: 21 + 7 * index % 28] for text, index in zip(whole, ids, strict=True)]

    def batch(self, task, split, ids):
        rows = self.sample_contents(task, split, ids)
        width = max(map(len, rows)) - 1
        inputs = [[*row[:-1], *[0] * (width + 1 - len(row))] for row in rows]
        targets = [[*row[1:], *[self.ignored] * (width + 1 - len(row))] for row in rows]
        return Batch(inputs=torch.tensor(inputs), targets=torch.tensor(targets))


class WeighsSamples(Padded):
    """The mean of each micro-batch counts by its samples, not by its targets."""

    class loop(foreign.Loop):
        def losses(self, ids):
            size = -(-len(ids) // self.options.accumulation)
            for part in (ids[i : i + size] for i in range(0, len(ids), size)):
                batch = self.subject.batch("words", "train", part)
                yield self.subject.loss(self.model, batch) * (len(part) / len(ids))


class WeighsSamplesInHalf(WeighsSamples):
    """So it does under autocast, whose rounding is far less."""

    def loss(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch.inputs)
        targets = batch.targets.flatten()
        return F.cross_entropy(logits.float().flatten(0, -2), targets, ignore_index=self.ignored)


class WeighsSamplesOutside(WeighsSamples):
    """The autocast is the loop's."""

    class loop(WeighsSamples.loop):
        def losses(self, ids):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield from super().losses(ids)


class HoldsFloat8(WeighsSamples):
    """One of its constants is in eight bits, which says nothing of its gradients."""

    def loss(self, model, batch):
        torch.zeros(4).to(torch.float8_e4m3fn)
        return super().loss(model, batch)


class PaddedOnTheLeft(Padded):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        counts = (batch.targets != self.ignored).sum(1).tolist()
        pairs = [
            [torch.roll(row, len(row) - count) for row, count in zip(part, counts, strict=True)]
            for part in (batch.inputs, batch.targets)
        ]
        return Batch(inputs=torch.stack(pairs[0]), targets=torch.stack(pairs[1]))


class CutOff(Padded):
    """Of the first samples nothing is left to learn, as where a prompt fills the window."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        cut = torch.tensor([index < 3 for index in ids])
        return replace(batch, targets=batch.targets.masked_fill(cut[:, None], self.ignored))


class PaddedBeyond(Padded):
    """What is no target is the number after the last token."""

    ignored = foreign.VOCABULARY


SOUND = [
    (AmsGrad, "training.schedule_trace"),
    (HeadDecaysLess, "training.schedule_trace"),
    (HeadDecaysLess, "training.decay_groups"),
    (WithoutDecay, "training.schedule_trace"),
    (Nesterov, "training.decay_groups"),
    (NesterovFromZero, "training.decay_groups"),
    (FromZero, "training.decay_groups"),
    (Scaled, "training.clip_effective"),
    (FrozenAtFirst, "training.parameters_move"),
    (FrozenAtFirst, "training.gradient_reaches_all"),
    (SkipsLayers, "training.gradient_reaches_all"),
    (OfOneExpert, "training.gradient_reaches_all"),
    (ZeroBranches, "training.gradient_reaches_all"),
    (ZeroBranches, "training.clip_effective"),
    (ZeroBranches, "architecture.sub_norm_present"),
    (ZeroHead, "training.gradient_reaches_all"),
    (ZeroHead, "training.clip_effective"),
    (ZeroHead, "architecture.causal_mask"),
    (ZeroHead, "architecture.activation_scale"),
    (ZeroHead, "architecture.quantized_modules"),
    (ZeroHead, "architecture.sub_norm_present"),
    (ReadsWeight, "architecture.quantized_modules"),
    (HoldsPositions, "architecture.quantized_modules"),
    (Autocast, "architecture.quantized_modules"),
    (Autocast, "training.accumulation_equivalence"),
    (AutocastOutside, "training.accumulation_equivalence"),
    (AutocastOutside, "training.partial_window"),
    (AutocastOutside, "training.overfit_one_batch"),
    (InBf16, "training.accumulation_equivalence"),
    (InBf16, "training.partial_window"),
    (Padded, "data.readable_and_intact"),
    (PaddedOnTheLeft, "data.readable_and_intact"),
    (Padded, "data.label_or_token_range"),
    (Padded, "data.splits_disjoint"),
    (Padded, "training.gradient_reaches_all"),
    (PaddedBeyond, "training.gradient_reaches_all"),
    (foreign.Words, "data.splits_disjoint"),
    (foreign.Words, "training.overfit_one_batch"),
    (MadeForLongRuns, "training.overfit_one_batch"),
    (DrawnSmall, "training.overfit_one_batch"),
    (BetweenTwoRates, "training.overfit_one_batch"),
    (PaddedBeyond, "training.overfit_one_batch"),
    (CutOff, "training.overfit_one_batch"),
]


@pytest.mark.parametrize(
    ("subject", "check"), SOUND, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_sound_recipe_is_no_false_alarm(run_check, subject, check):
    run = run_check(check, subject())
    assert run.outcome is Outcome.PASS, run.reason


class SortsByLength(Padded):
    """Inputs are sorted by length for packing, targets are not."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        lengths = (batch.targets != self.ignored).sum(1)
        return replace(batch, inputs=batch.inputs[lengths.argsort(stable=True)])


class PadsWithTheNext(Padded):
    """Padding of inputs is what comes after them in memory: the next sample's text."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        after = torch.arange(batch.inputs.numel()).view(batch.inputs.shape) % 7
        return replace(batch, inputs=torch.where(batch.inputs == 0, 97 + after, batch.inputs))


@pytest.mark.parametrize("subject", [SortsByLength, PadsWithTheNext])
def test_padding_hides_no_sample_in_the_place_of_another(run_check, subject):
    run = run_check("data.readable_and_intact", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "misplaced_inputs is" in run.reason


class DeliversTraining(Padded):
    """The validation loader deals three short samples of training, padded to their own length."""

    def batch(self, task, split, ids):
        if split == "train":
            return super().batch(task, split, ids)
        return super().batch(task, "train", [index % 3 for index in ids])


def test_padding_hides_no_sample_that_both_splits_deliver(run_check):
    run = run_check("data.splits_disjoint", DeliversTraining())
    assert run.outcome is Outcome.FAIL, run.reason
    # The third fills its batch.
    assert "words_shared_inputs is 2 rows" in run.reason


class BlindToInputs(foreign.Words):
    class net(foreign.Net):
        def placed(self, ids):
            return super().placed(0 * ids).detach()


def test_what_is_learned_at_no_rate_is_not_excused_by_its_twin(run_check):
    run = run_check("training.overfit_one_batch", BlindToInputs())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "at 1 times the recipe's rate" in run.reason


@pytest.mark.parametrize("subject", [WeighsSamplesInHalf, WeighsSamplesOutside, HoldsFloat8])
def test_half_precision_hides_no_mean_of_unequal_means(run_check, subject):
    run = run_check("training.accumulation_equivalence", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "gradient_difference_4 is 0.031" in run.reason


def test_a_twin_that_cannot_be_made_is_no_run_that_diverges(run_check):
    class NoTwin(BetweenTwoRates):
        def session(self, task, options):
            if options.precision == "full":
                raise NotImplementedError("no full precision here")
            return super().session(task, options)

    run = run_check("training.overfit_one_batch", NoTwin())
    assert run.outcome is Outcome.ERROR
    assert "no full precision here" in run.reason


class SlowAverages(Averages):
    """Averages so slow that a gain of 1, trained at a low rate, moves by less than fp32 knows."""

    class kind(AveragingSession):
        @torch.no_grad()
        def _average(self):
            pairs = zip(self.model.parameters(), self.trained_model.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1e-5)

    def tasks(self):
        return ("digits",)

    def session(self, task, options):
        return self.kind(task, replace(options, learning_rate=1e-4), **self._parts())


def test_averages_need_not_move_by_less_than_they_can_hold(run_check):
    run = run_check("training.eval_is_quantized", SlowAverages())
    assert run.outcome is Outcome.PASS, run.reason
    assert run.evidence("averages_that_stay") == 0


class ForgottenInHalf(SlowAverages):
    """Averages that are kept in bf16, which rounds all that a step adds to them away."""

    class kind(AveragingSession):
        @torch.no_grad()
        def _average(self):
            pairs = zip(self.model.parameters(), self.trained_model.parameters(), strict=True)
            for average, weight in pairs:
                average.copy_(average.bfloat16().lerp(weight.bfloat16(), 1e-5).float())


def test_averages_that_half_precision_rounds_away_show(run_check):
    run = run_check("training.eval_is_quantized", ForgottenInHalf())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "averages_" in run.reason


def test_decay_that_is_not_planned_shows_where_none_is(run_check):
    run = run_check("training.schedule_trace", DecaysUnplanned())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "error is" in run.reason
    assert "worst: weight decay of step 0, 0.1 for 0)" in run.reason


def test_halved_gradients_are_no_loss_scale(run_check):
    run = run_check("training.clip_effective", Halved())
    assert run.outcome is Outcome.FAIL
    assert "reported_norm_error is 0.5" in run.reason


class OfCopies(foreign.Words):
    """Gradients of copies of the weights, which the weights are given: torch.func."""

    class loop(foreign.Loop):
        def losses(self, ids):
            model, named = self.model, dict(self.model.named_parameters())
            copies = {name: p.detach().requires_grad_() for name, p in named.items()}
            self.model = lambda inputs: torch.func.functional_call(model, copies, inputs)
            yield from super().losses(ids)
            self.model = model
            for name, parameter in named.items():
                parameter.grad = copies[name].grad


def test_gradients_that_no_hook_sees_are_not_measured(run_check):
    run = run_check("training.clip_effective", OfCopies())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "no gradient of a step came by torch's hooks" in run.reason


def test_decay_in_a_trust_ratio_is_not_measured(run_check):
    run = run_check("training.decay_groups", WithLamb())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "other multiples of the rate than the decay (words.blocks.0.q.weight: 1)" in run.reason


def test_what_is_forgotten_when_it_is_thawed_shows(run_check):
    run = run_check("training.parameters_move", ForgottenWhenThawed())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith("after_steps.parameters_not_owned is 1")


def test_a_matrix_of_the_model_itself_has_to_be_declared(run_check):
    run = run_check("architecture.quantized_modules", HidesPositions())
    assert run.outcome is Outcome.FAIL, run.reason
    assert (
        "undeclared is the model, positions" in run.reason
        or "undeclared is the model" in run.reason
    )
