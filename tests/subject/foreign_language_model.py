"""A tiny language model as a user would write it, with a recipe that subclasses vary.

Grouped queries, learned positions, ternary layers with a norm inside, AdamW with decay groups.
It offers Quantizes, BuildsModel, LoadsData and Trains.
"""

import hashlib
import math
import random
import time

import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.subject.protocols import (
    Batch,
    DataInfo,
    ModelSpec,
    ScheduleSpec,
    ScheduleStep,
    StepRecord,
)

VOCABULARY, LENGTH, WIDTH, HEADS, GROUPS, HIDDEN, DEPTH = 128, 48, 32, 4, 2, 64, 2
HEAD = WIDTH // HEADS


def weight_codes(weight):
    values = weight.detach().float()
    scale = values.abs().mean().clamp(min=1e-5)
    return (values / scale).round().clamp(-1, 1).to(torch.int8), scale


def activation_codes(x):
    values = x.detach().float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


class Ternary(torch.autograd.Function):
    """The product in fp32 whatever the autocast, in the dtype of its input."""

    @staticmethod
    def forward(ctx, x, weight):
        parts = (*weight_codes(weight), *activation_codes(x))
        ctx.save_for_backward(*parts)
        ctx.dtype = x.dtype
        codes, scale, q, beta = parts
        with torch.autocast("cpu", enabled=False):
            return ((q.float() @ codes.float().T) * (beta * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        codes, scale, q, beta = ctx.saved_tensors
        g = grad.float()
        with torch.autocast("cpu", enabled=False):
            of_weight = g.flatten(0, -2).T @ (q.float() * beta).flatten(0, -2)
            return (g @ (codes.float() * scale)).to(ctx.dtype), of_weight


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-8)
        return (x.float() * rms * self.weight).to(x.dtype)


class BitLayer(nn.Module):
    full = False

    def __init__(self, inputs, outputs, generator):
        super().__init__()
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        self.weight = nn.Parameter(weight)
        self.norm = Norm(inputs)

    def forward(self, x):
        x = self.norm(x)
        return F.linear(x, self.weight) if self.full else Ternary.apply(x, self.weight)


SHAPES = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, HEAD * GROUPS),
    "v": (WIDTH, HEAD * GROUPS),
    "o": (WIDTH, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
NAMES = tuple(f"blocks.{i}.{name}" for i in range(DEPTH) for name in SHAPES)


class Block(nn.Module):
    def __init__(self, generator):
        super().__init__()
        for name, shape in SHAPES.items():
            self.add_module(name, BitLayer(*shape, generator))

    def forward(self, x):
        shape = (*x.shape[:2], -1, HEAD)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)).square())


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(generator) for _ in range(DEPTH))
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for module in (self.embed, self.positions, self.head):
                module.weight.copy_(0.1 * torch.randn(module.weight.shape, generator=generator))

    def placed(self, ids):
        return self.embed(ids) + self.positions(torch.arange(ids.shape[1]))

    def forward(self, ids):
        x = self.placed(ids)
        for block in self.blocks:
            x = self.through(block, x)
        return self.head(self.norm(x))

    def through(self, block, x):
        return block(x)


def windows(seed, count):
    """Windows of documents of words, other documents for another seed."""
    words = random.Random(0)
    words = ["".join(words.choices("abcdefghijklmnop", k=words.randint(2, 6))) for _ in range(40)]
    drawn = random.Random(seed)
    documents = [" ".join(drawn.choices(words, k=60)).encode() for _ in range(count)]
    places = range(0, 3 * LENGTH, LENGTH)
    return documents, [d[i : i + LENGTH + 1] for d in documents for i in places]


SPLITS = {"train": windows(1, 64), "validation": windows(2, 16)}


class Loop:
    def __init__(self, subject, options):
        self.subject, self.options = subject, options
        self.model = subject.build_model("words", seed=options.seed)
        for module in self.model.modules():
            if isinstance(module, BitLayer):
                module.full = options.precision == "full"
        self.plan = subject.planned_schedule("words", options)
        self.optimizer = subject.optimizer(self.model)
        self.step_index = self.place = 0
        self.order = []

    def next_ids(self):
        if self.options.fixed_batch is not None:
            return list(self.options.fixed_batch)
        if self.place >= len(self.order):
            self.place = 0
            epoch = self.step_index
            self.order = self.subject.epoch_order("words", seed=self.options.seed, epoch=epoch)
        start = self.place
        self.place += self.options.batch_size or 16
        return list(self.order[start : self.place])

    def losses(self, ids):
        """Each micro-batch's share of the mean over all targets."""
        size = -(-len(ids) // self.options.accumulation)
        parts = [
            self.subject.batch("words", "train", ids[i : i + size])
            for i in range(0, len(ids), size)
        ]
        counts = [int(self.subject.known(part).sum()) for part in parts]
        for part, count in zip(parts, counts, strict=True):
            yield self.subject.loss(self.model, part) * (count / sum(counts))

    def step(self):
        start, plan = time.perf_counter(), self.plan[self.step_index]
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate
            group["weight_decay"] = plan.weight_decay * group.get("decays", 1.0)
        ids, total = self.next_ids(), 0.0
        self.optimizer.zero_grad()
        for loss in self.losses(ids):
            (loss * self.subject.loss_scale).backward()
            total += float(loss.detach())
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad.div_(self.subject.loss_scale)
        norm = self.clip(parameters)
        self.optimizer.step()
        self.step_index += 1
        return StepRecord(
            step=self.step_index - 1,
            loss=total,
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            grad_norm=float(norm),
            sample_ids=tuple(ids),
            seconds=time.perf_counter() - start,
        )

    def clip(self, parameters):
        return nn.utils.clip_grad_norm_(
            parameters, self.options.clip_norm or 1.0, error_if_nonfinite=True
        )

    def evaluate(self):
        raise NotImplementedError

    def state_tensors(self):
        return dict(self.model.state_dict())


class Words:
    """Offers Quantizes, BuildsModel, LoadsData and Trains."""

    name = "words"
    loop = Loop
    net = Net
    loss_scale = 1.0
    full_precision = ("embed", "positions", "head")
    ignored = None

    def quantize_weight(self, weight):
        return weight_codes(weight)

    def quantize_activation(self, x):
        return activation_codes(x)

    def linear(self, x, weight, bias=None):
        y = Ternary.apply(x, weight)
        return y if bias is None else y + bias

    def integer_linear(self, x, weight):
        codes, scale = weight_codes(weight)
        q, beta = activation_codes(x)
        return q.int() @ codes.int().T, beta * scale

    def tasks(self):
        return ("words",)

    def model_spec(self, task):
        layers = sum(i * o + i for i, o in SHAPES.values())
        around = (2 * VOCABULARY + LENGTH + 1) * WIDTH
        return ModelSpec(
            task=task,
            parameters=DEPTH * layers + around,
            max_parameters=100_000,
            quantized=NAMES,
            full_precision=self.full_precision,
            sub_norms=tuple(f"{name}.norm" for name in NAMES),
            causal=True,
        )

    def build_model(self, task, *, seed):
        return self.net(seed)

    def loss(self, model, batch):
        ignored = -100 if self.ignored is None else self.ignored
        logits = model(batch.inputs).float().flatten(0, -2)
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=ignored)

    def example_batch(self, task, *, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (batch_size, LENGTH + 1), generator=generator)
        return Batch(inputs=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())

    def effective_weights(self, model):
        values = {name: weight_codes(w) for name, w in self.latent_weights(model).items()}
        return {name: codes * scale for name, (codes, scale) in values.items()}

    def latent_weights(self, model):
        return {name: model.get_submodule(name).weight for name in NAMES}

    def data_info(self, task):
        return DataInfo(
            kind="tokens",
            cardinality=VOCABULARY,
            train_size=len(SPLITS["train"][1]),
            validation_size=len(SPLITS["validation"][1]),
            digest=self.data_digest(task),
            input_dtype="int64",
            ignored_target=self.ignored,
        )

    def data_digest(self, task):
        content = b"".join(d for documents, _ in SPLITS.values() for d in documents)
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def documents(self, task, split):
        return SPLITS[split][0]

    def sample_contents(self, task, split, ids):
        return [SPLITS[split][1][index] for index in ids]

    def labels(self, task, split):
        return sorted({byte for window in SPLITS[split][1] for byte in window})

    def batch(self, task, split, ids):
        rows = torch.tensor([list(content) for content in self.sample_contents(task, split, ids)])
        return Batch(inputs=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())

    def known(self, batch):
        ignored = -100 if self.ignored is None else self.ignored
        return batch.targets != ignored

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        order = list(range(self.data_info(task).train_size))
        random.Random(1000 * seed + epoch).shuffle(order)
        return order[rank::world_size]

    def groups(self, model):
        """Matrices decay; norms and embeddings do not."""
        embeddings = {id(model.embed.weight), id(model.positions.weight)}
        decay, rest = [], []
        for p in model.parameters():
            (rest if p.dim() < 2 or id(p) in embeddings else decay).append(p)
        return [{"params": decay}, {"params": rest, "decays": 0.0}]

    def optimizer(self, model):
        return torch.optim.AdamW(self.groups(model), lr=1e-3, betas=(0.9, 0.95))

    def session(self, task, options):
        return self.loop(self, options)

    def schedule_spec(self, task, options):
        return ScheduleSpec(
            kind="cosine",
            peak=options.learning_rate or 3e-3,
            warmup_steps=min(3, options.steps - 1),
            total_steps=options.steps,
            weight_decay=0.1,
            final_fraction=0.1,
        )

    def planned_schedule(self, task, options):
        spec, steps = self.schedule_spec(task, options), []
        for step in range(options.steps):
            done = (step - spec.warmup_steps) / max(1, options.steps - 1 - spec.warmup_steps)
            rate = spec.peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
            if step < spec.warmup_steps:
                rate = spec.peak * (step + 1) / spec.warmup_steps
            steps.append(ScheduleStep(learning_rate=rate, weight_decay=spec.weight_decay))
        return steps
