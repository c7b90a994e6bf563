"""The optimizer: the parameters it owns, the gradients it is given, what it decays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.quantizer import EPS
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    as_kind,
    before_each_step,
    largest,
    of_text,
    round_to_bf16,
    ternary_layers,
    text_trained,
)
from forge_harness.protocols import Batch, ModelSpec, StepRecord
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession

REACHES, MOVES = "training.gradient_reaches_all", "training.parameters_move"
SCHEDULE, DECAY = "training.schedule_trace", "training.decay_groups"


def _cuts_gradient(session: Any) -> None:
    layer: Any = ternary_layers(session.model)[0]
    kept = layer.linear
    layer.linear = lambda x, w, b=None: kept(x, w.detach(), b)


def _gradient_every_other_step(session: Any) -> None:
    weight: Any = largest(session)
    weight.register_hook(lambda g: g * (session.step_index % 2))


def _replaces_parameter(session: Any) -> None:
    layer = ternary_layers(session.model)[0]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _forgets_parameter(session: Any) -> None:
    session.optimizer.param_groups[-1]["params"].pop()


def _forgets_vectors(session: Any) -> None:
    for group in session.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.dim() > 1]


def _only_decay_moves_it(session: Any) -> None:
    weight: Any = largest(session)
    weight.register_hook(lambda g: g * 0)


def _gains_stay(session: Any) -> None:
    for parameter in session.model.parameters():
        if parameter.dim() < 2:
            parameter.register_hook(lambda g: g * 0)


def _keeps_latents_in_bf16(session: Any) -> None:
    round_to_bf16(session)
    session.optimizer.register_step_post_hook(lambda *_: round_to_bf16(session))


def _decays_everything(session: Any) -> None:
    for group in session.optimizer.param_groups:
        group["decays"] = True


@torch.no_grad()
def _coupled_decay(session: Any) -> None:
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.add_(parameter, alpha=group["weight_decay"])
        group["weight_decay"] = 0.0


@torch.no_grad()
def _decay_of_codes(session: Any) -> None:
    rate = session.optimizer.param_groups[0]["weight_decay"]
    for layer in ternary_layers(session.model):
        if layer.weight.grad is not None:
            layer.weight.grad.add_(layer.effective_weight(), alpha=rate)
    for group in session.optimizer.param_groups:
        group["weight_decay"] = 0.0


def _doubled_decay(session: Any) -> None:
    for group in session.optimizer.param_groups:
        group["weight_decay"] *= 2


class _DecaysByHand(QATSession):
    """Decay after the optimizer's step, on every parameter."""

    def step(self) -> StepRecord:
        record = super().step()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - record.learning_rate * 0.05)
        return record


class _DecaysTowardsCodes(QATSession):
    """Decay after the optimizer's step pulls latents to the values they are rounded to."""

    def step(self) -> StepRecord:
        record = super().step()
        with torch.no_grad():
            for layer in ternary_layers(self.model):
                pull = layer.effective_weight() - layer.weight
                layer.weight.add_(pull, alpha=record.learning_rate * 0.1)
        return record


class _DecaysBeforehand(QATSession):
    """Decay by hand before the optimizer's step."""

    def step(self) -> StepRecord:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - 1e-4)
        return super().step()


class ShiftsTwice(ReferenceSubject):
    """The data are shifted, and the loss shifts again: it predicts the token after next."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the output against the next position's target."""
        if batch.targets.dim() == 1:
            return super().loss(model, batch)
        logits = model(batch.inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten())


class _FrozenNorms(ReferenceSubject):
    """Norms are frozen, and said to be."""

    def model_spec(self, task: str) -> ModelSpec:
        spec = super().model_spec(task)
        model = super().build_model(task, seed=0)
        frozen = sum(p.numel() for p in model.parameters() if p.dim() < 2)
        return replace(spec, parameters=spec.parameters - frozen)

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        model = super().build_model(task, seed=seed)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() >= 2)
        return model


class _RowScales(ReferenceSubject):
    """One scale a row."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().mean(dim=1, keepdim=True).clamp(min=EPS)
        return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale.flatten()


DEFECTS = (
    Defect(
        id="G01_one_layer_detached",
        title="The weight of one layer is detached before it is used",
        stage=Stage.BACKWARD,
        check=REACHES,
        shows="parameters_without_gradient is",
        subject=lambda: SessionDefect(_cuts_gradient),
        alive=observe.trained,
        source="kyegomez/BitNet#51",
        subtlety=3,
    ),
    Defect(
        id="G05_gradient_now_and_then",
        title="The largest parameter has a gradient in every second step only",
        stage=Stage.BACKWARD,
        check=REACHES,
        shows="parameters_without_gradient is",
        subject=lambda: SessionDefect(_gradient_every_other_step),
        alive=observe.trained,
        source="pytorch/ao#2280",
        subtlety=4,
    ),
    Defect(
        id="G05_gains_without_gradient",
        title="The gradients of the norms' gains are nulled: they keep their initial values",
        stage=Stage.BACKWARD,
        check=REACHES,
        shows="parameters_without_gradient is",
        subject=lambda: SessionDefect(_gains_stay),
        alive=observe.trained,
        source="pytorch/ao#2280",
        subtlety=3,
    ),
    Defect(
        id="T14_shifted_twice",
        title="The data and the loss both shift the targets: it learns the token after next",
        stage=Stage.TRAINING,
        check=REACHES,
        shows="bytes.target_elsewhere is inf",
        subject=ShiftsTwice,
        alive=observe.gradients,
        source="huggingface/transformers#47394",
        subtlety=3,
    ),
    Defect(
        id="parameter_replaced",
        title="A weight is replaced after the optimizer was built, which goes on with the old one",
        stage=Stage.TRAINING,
        check=MOVES,
        shows="parameters_not_owned is",
        subject=lambda: SessionDefect(_replaces_parameter),
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="parameter_forgotten",
        title="The optimizer was not given one of the parameters",
        stage=Stage.TRAINING,
        check=MOVES,
        shows="parameters_not_owned is",
        subject=lambda: SessionDefect(_forgets_parameter),
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="vectors_of_text_forgotten",
        title="The optimizer of the text task was not given the norms",
        stage=Stage.TRAINING,
        check=MOVES,
        shows="bytes.parameters_not_owned is",
        subject=lambda: SessionDefect(of_text(_forgets_vectors)),
        alive=text_trained,
        subtlety=4,
    ),
    Defect(
        id="only_decay",
        title="The largest parameter has a gradient of zero, and moves by its decay alone",
        stage=Stage.TRAINING,
        check=MOVES,
        shows="parameters_only_decaying is",
        subject=lambda: SessionDefect(_only_decay_moves_it),
        alive=observe.trained,
        source="pytorch/tutorials#855",
        subtlety=3,
    ),
    Defect(
        id="T10_bf16_latents",
        title="Latents are kept in bf16: small updates round away",
        stage=Stage.TRAINING,
        check=MOVES,
        shows="moved_at_low_rate is",
        subject=lambda: SessionDefect(_keeps_latents_in_bf16),
        alive=observe.trained,
        source="pytorch/ao#1124",
        subtlety=3,
    ),
    Defect(
        id="T08_decays_everything",
        title="Norms and embeddings decay too",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="exempt_decayed is",
        subject=lambda: SessionDefect(_decays_everything),
        alive=observe.trained,
        source="huggingface/transformers#35927",
        subtlety=4,
    ),
    Defect(
        id="T08_by_hand",
        title="Every parameter is decayed by hand after the optimizer's step",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="digits.moved_outside is 10",
        subject=lambda: SessionDefect(as_kind(_DecaysByHand)),
        alive=observe.trained,
        source="ServiceNow/Fast-LLM#542",
        subtlety=4,
    ),
    Defect(
        id="T08_by_hand_before",
        title="Every parameter is decayed by hand before the optimizer's step",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="digits.moved_outside is 10",
        subject=lambda: SessionDefect(as_kind(_DecaysBeforehand)),
        alive=observe.trained,
        source="ServiceNow/Fast-LLM#542",
        subtlety=4,
    ),
    Defect(
        id="T09_coupled",
        title="Weight decay is added to the gradient instead of being decoupled",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="decay_error is",
        subject=lambda: SessionDefect(before_each_step(_coupled_decay)),
        alive=observe.trained,
        source="pytorch/ao#736",
        subtlety=4,
    ),
    Defect(
        id="T09_doubled",
        title="Weight decay is applied twice",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="decay_error is",
        subject=lambda: SessionDefect(before_each_step(_doubled_decay)),
        alive=observe.trained,
        source="Nerogar/OneTrainer#996",
        subtlety=4,
    ),
    Defect(
        id="T09_of_codes",
        title="The gradient is given the decay of the ternary weight instead of the latent",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="decay_error is",
        subject=lambda: SessionDefect(before_each_step(_decay_of_codes)),
        alive=observe.trained,
        subtlety=4,
    ),
    Defect(
        id="T09_towards_codes",
        title="After each step latents are pulled to the values they are rounded to",
        stage=Stage.TRAINING,
        check=DECAY,
        shows="digits.moved_outside is 6",
        subject=lambda: SessionDefect(as_kind(_DecaysTowardsCodes)),
        alive=observe.trained,
        subtlety=4,
    ),
    Defect(
        id="T09_towards_codes_in_the_schedule",
        title="Latents move beside the optimizer, to the values they are rounded to",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="digits.moved_outside is 6",
        subject=lambda: SessionDefect(as_kind(_DecaysTowardsCodes)),
        alive=observe.trained,
        subtlety=4,
    ),
)

BENIGN = (
    Benign(
        id="frozen_norms",
        title="Norms are frozen, and said to be",
        subject=_FrozenNorms,
        checks=("training.non_finite_stops", REACHES, DECAY, SCHEDULE),
    ),
    Benign(
        id="one_scale_a_row",
        title="One scale for each row of a weight",
        subject=_RowScales,
        checks=("training.ste_input_gradient", "training.ste_weight_gradient"),
    ),
)
