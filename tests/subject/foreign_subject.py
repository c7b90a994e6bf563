"""A subject as a user would write it: their own layer, model and training loop, none of ours.

Two blobs of points, a three-layer network whose middle layers are ternary, SGD with momentum.
It offers three capabilities: Quantizes, BuildsModel and Trains.
"""

import math
import time

import torch
from torch import nn

from forge_harness.subject.protocols import (
    Batch,
    ModelSpec,
    ScheduleSpec,
    ScheduleStep,
    StepRecord,
)


class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def weight_codes(weight):
    scale = weight.detach().float().abs().mean().clamp(min=1e-5)
    return (weight.detach().float() / scale).round().clamp(-1, 1).to(torch.int8), scale


def activation_codes(x):
    scale = x.detach().float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    return (x.detach().float() / scale).round().clamp(-127, 127).to(torch.int8), scale


class TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        w_codes, w_scale = weight_codes(weight)
        x_codes, x_scale = activation_codes(x)
        ctx.save_for_backward(w_codes, w_scale, x_codes, x_scale)
        return (x_codes.float() @ w_codes.float().T) * (x_scale * w_scale)

    @staticmethod
    def backward(ctx, grad):
        w_codes, w_scale, x_codes, x_scale = ctx.saved_tensors
        x = x_codes.float() * x_scale
        w = w_codes.float() * w_scale
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


class BitLayer(nn.Module):
    precision = "ternary"

    def __init__(self, inputs, outputs, generator):
        super().__init__()
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        self.weight = nn.Parameter(weight)
        self.norm = nn.LayerNorm(inputs, elementwise_affine=False)

    def forward(self, x):
        if self.precision == "full":
            return nn.functional.linear(self.norm(x), self.weight)
        return TernaryLinear.apply(self.norm(x), self.weight)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = BitLayer(8, 32, generator)
        self.down = BitLayer(32, 2, generator)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Loop:
    def __init__(self, subject, options):
        self.subject = subject
        self.options = options
        self.model = subject.build_model("blobs", seed=options.seed)
        for layer in self.model.children():
            layer.precision = options.precision
        self.plan = subject.planned_schedule("blobs", options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.data = subject.example_batch("blobs", batch_size=512, seed=options.seed)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step_index = 0

    def step(self):
        start = time.perf_counter()
        plan = self.plan[self.step_index]
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = plan.learning_rate, plan.weight_decay
        size = self.options.batch_size or 32
        ids = torch.randint(512, (size,), generator=self.generator)
        if self.options.fixed_batch is not None:
            ids = torch.tensor(self.options.fixed_batch)
        batch = Batch(inputs=self.data.inputs[ids], targets=self.data.targets[ids])
        self.optimizer.zero_grad()
        loss = self.subject.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.options.clip_norm or 1.0, error_if_nonfinite=True
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()}")
        self.optimizer.step()
        self.step_index += 1
        return StepRecord(
            step=self.step_index - 1,
            loss=loss.item(),
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            grad_norm=norm.item(),
            sample_ids=tuple(ids.tolist()),
            seconds=time.perf_counter() - start,
        )

    def evaluate(self):
        with torch.no_grad():
            logits = self.model(self.data.inputs)
        right = (logits.argmax(-1) == self.data.targets).float().mean().item()
        loss = nn.functional.cross_entropy(logits, self.data.targets).item()
        return {"loss": loss, "accuracy": right}

    def state_tensors(self):
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            state[f"momentum.{index}"] = entry["momentum_buffer"]
        state["generator"] = self.generator.get_state()
        return state


class Blobs:
    """Offers Quantizes, BuildsModel and Trains."""

    name = "blobs"

    def quantize_weight(self, weight):
        return weight_codes(weight)

    def quantize_activation(self, x):
        return activation_codes(x)

    def linear(self, x, weight, bias=None):
        y = TernaryLinear.apply(x, weight)
        return y if bias is None else y + bias

    def integer_linear(self, x, weight):
        w_codes, w_scale = weight_codes(weight)
        x_codes, x_scale = activation_codes(x)
        return (x_codes.int() @ w_codes.int().T), x_scale * w_scale

    def tasks(self):
        return ("blobs",)

    def model_spec(self, task):
        return ModelSpec(
            task=task,
            parameters=8 * 32 + 32 * 2,
            max_parameters=1000,
            quantized=("up", "down"),
            full_precision=(),
            sub_norms=("up.norm", "down.norm"),
        )

    def build_model(self, task, *, seed):
        return Net(seed)

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch.inputs), batch.targets)

    def example_batch(self, task, *, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(2, (batch_size,), generator=generator)
        centres = torch.where(targets[:, None] == 1, 1.0, -1.0)
        inputs = centres + torch.randn(batch_size, 8, generator=generator)
        return Batch(inputs=inputs, targets=targets)

    def effective_weights(self, model):
        values = {}
        for name in ("up", "down"):
            codes, scale = weight_codes(getattr(model, name).weight)
            values[name] = codes * scale
        return values

    def latent_weights(self, model):
        return {"up": model.up.weight, "down": model.down.weight}

    def session(self, task, options):
        return Loop(self, options)

    def schedule_spec(self, task, options):
        return ScheduleSpec(
            kind="cosine",
            peak=options.learning_rate or 0.05,
            warmup_steps=min(2, options.steps - 1),
            total_steps=options.steps,
            weight_decay=0.0,
            final_fraction=0.1,
        )

    def planned_schedule(self, task, options):
        spec = self.schedule_spec(task, options)
        steps = []
        for step in range(options.steps):
            if step < spec.warmup_steps:
                rate = spec.peak * (step + 1) / spec.warmup_steps
            else:
                done = (step - spec.warmup_steps) / max(1, options.steps - 1 - spec.warmup_steps)
                cosine = 0.5 * (1 + math.cos(math.pi * done))
                rate = spec.peak * (spec.final_fraction + (1 - spec.final_fraction) * cosine)
            steps.append(ScheduleStep(learning_rate=rate, weight_decay=0.0))
        return steps
