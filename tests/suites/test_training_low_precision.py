"""Weights that are stored in bf16 are held to what bf16 can show, and to no more."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_subject.py"
SPEC = importlib.util.spec_from_file_location("foreign_subject", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)


class RoundedStochastically(torch.optim.Optimizer):
    """AdamW with fp32 moments and bf16 weights, as torchao's bf16_stochastic_round makes it."""

    def __init__(self, params, seed):
        super().__init__(params, {"lr": 0.01, "weight_decay": 0.1})
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self._rounded(self._moved(p, group)))

    def _moved(self, p, group):
        state = self.state[p]
        if not state:
            state.update(m=torch.zeros(p.shape), v=torch.zeros(p.shape), t=torch.zeros(()))
        state["t"] += 1
        state["m"].lerp_(p.grad.float(), 0.1)
        state["v"].lerp_(p.grad.float().square(), 0.02)
        m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.98 ** state["t"])
        return p.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * m / (
            v.sqrt() + 1e-8
        )

    def _rounded(self, w):
        noise = torch.randint(0, 1 << 16, w.shape, generator=self.generator, dtype=torch.int32)
        return ((w.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()


class Loop(foreign.Loop):
    def __init__(self, subject, options):
        super().__init__(subject, options)
        self.optimizer = RoundedStochastically(self.model.parameters(), options.seed + 1)


class Bf16(foreign.Blobs):
    def build_model(self, task, *, seed):
        return super().build_model(task, seed=seed).bfloat16()

    def loss(self, model, batch):
        logits = model(batch.inputs.to(next(model.parameters()).dtype)).float()
        return nn.functional.cross_entropy(logits, batch.targets)

    def schedule_spec(self, task, options):
        return replace(super().schedule_spec(task, options), weight_decay=0.1)

    def planned_schedule(self, task, options):
        return [replace(s, weight_decay=0.1) for s in super().planned_schedule(task, options)]

    def session(self, task, options):
        return Loop(self, options)


@pytest.mark.parametrize(
    "check",
    [
        "ste_input_gradient",
        "ste_weight_gradient",
        "clip_effective",
        "non_finite_stops",
        "schedule_trace",
    ],
)
def test_bf16_is_held_to_its_own_rounding(run_check, check):
    run = run_check(f"training.{check}", Bf16())
    assert run.outcome is Outcome.PASS, run.reason


class SmallRate(Bf16):
    """Updates of less than one step of bf16."""

    def schedule_spec(self, task, options):
        return replace(super().schedule_spec(task, options), peak=0.001)


@pytest.mark.parametrize(
    ("check", "subject"),
    [("parameters_move", Bf16), ("schedule_trace", SmallRate), ("decay_groups", Bf16)],
)
def test_what_bf16_hides_is_not_measured(run_check, check, subject):
    run = run_check(f"training.{check}", subject())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "weights in less than fp32 cannot show" in run.reason


def test_a_wrong_gradient_is_seen_in_bf16_too(run_check, monkeypatch):
    class OneColumnLost(foreign.TernaryLinear):
        @staticmethod
        def backward(ctx, grad, true=foreign.TernaryLinear.backward):
            grad_x, grad_w = true(ctx, grad)
            return grad_x, grad_w * (torch.arange(grad_w.shape[1]) > 0)

    monkeypatch.setattr(foreign, "TernaryLinear", OneColumnLost)
    run = run_check("training.ste_weight_gradient", Bf16())
    assert run.outcome is Outcome.FAIL, run.reason
