"""What subjects do, in values that can be compared: proof that a seeded defect is alive.

An observable asks a subject through its protocols and returns numbers, bytes and tensors. It
judges nothing: the same observable of the reference subject and of a defect must differ. None of
them is taken from a check, so that a blind check does not make its defect look dead.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.protocols import TrainOptions

STEPS = 8
"""Training steps of a trace: past the warm-up of a short schedule, 0.1 s on digits."""


def fingerprint(observable: Callable[[Any], object], subject: object) -> str:
    """Returns a digest of what the subject does, or how it raised.

    Tensors count with dtype, shape and every bit; floats with every bit.
    """
    digest = hashlib.sha256()
    try:
        for part in _parts(observable(subject)):
            digest.update(part)
            digest.update(b"\0")
    except Exception as error:  # What raises differs from what does not, and is named.
        return f"raised {type(error).__name__}"
    return f"sha256:{digest.hexdigest()}"


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        plain = value.detach().contiguous().cpu()
        yield f"{plain.dtype}{tuple(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    elif isinstance(value, Path):
        yield value.read_bytes()
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, Enum) or value is None or isinstance(value, str | int | bool):
        yield repr(value).encode()
    elif isinstance(value, float):
        yield (b"nan" if math.isnan(value) else value.hex().encode())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield repr(key).encode()
            yield from _parts(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts({field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Sequence | set | frozenset):
        entries = value if isinstance(value, Sequence) else sorted(value, key=repr)
        yield f"[{len(entries)}]".encode()
        for entry in entries:
            yield from _parts(entry)
    else:
        raise TypeError(f"An observable returned {type(value).__name__}.")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights() -> list[Tensor]:
    """Returns weights on which quantizers differ: random, unequal rows, ties, zeros, tiny."""
    random = torch.randn(96, 128, generator=_generator(1)) * 0.02
    rows = random * torch.logspace(-2, 2, 96)[:, None]
    ties = torch.tensor([1.0, -1.0, 3.0, -3.0, 0.0, 2.0, -2.0, 4.0]).repeat(8, 16)
    tiny = random * 1e-7
    return [random, rows, ties, torch.zeros(16, 32), tiny, random[:65, :1]]


def activations() -> list[Tensor]:
    """Returns activations on which quantizers differ: ends of the range, halves, zeros, tiny."""
    random = torch.randn(4, 7, 128, generator=_generator(2))
    tokens = random * torch.logspace(-6, 6, 7)[None, :, None]
    halves = (torch.arange(255.0) - 127.0)[None] / 2
    halves[0, -1] = 127.0
    return [random, tokens, halves, torch.zeros(3, 32), random.flatten(0, 1)[:, :1]]


def weight_codes(subject: Any) -> object:
    """Codes and scales of weights, and again after the same weight has moved."""
    seen: list[object] = []
    for weight in weights():
        moving = torch.nn.Parameter(weight.clone())
        for _ in range(2):
            seen.append([part.clone() for part in subject.quantize_weight(moving)])
            seen.append(moving.detach().clone())
            with torch.no_grad():
                moving.mul_(-1.5).add_(0.01)
    return seen


def activation_codes(subject: Any) -> object:
    """Codes and scales of activations."""
    return [
        [part.clone() for part in subject.quantize_activation(x.clone())] for x in activations()
    ]


def linear(subject: Any) -> object:
    """The training forward with its gradients, also for an upstream gradient that is expanded."""
    seen: list[object] = []
    for x in activations():
        rows = torch.randn(48, x.shape[-1], generator=_generator(3)) * 0.1
        for expanded in (False, True):
            inputs = x.clone().requires_grad_()
            weight, bias = rows.clone().requires_grad_(), torch.ones(48).requires_grad_()
            y = subject.linear(inputs, weight, bias)
            upstream = torch.randn(y.shape, generator=_generator(4))
            kept = upstream[..., :1].expand(y.shape) if expanded else upstream
            y.backward(kept)
            seen += [y, inputs.grad, weight.grad, bias.grad, upstream]
    return seen


def integer_products(subject: Any) -> object:
    """Integer products, small and with sums beyond 16 bits."""
    seen: list[object] = []
    for x in activations()[:2]:
        for weight in weights()[:3]:
            wide = weight if weight.shape[-1] == x.shape[-1] else weight[:, : x.shape[-1]]
            seen += subject.integer_linear(x, wide)
    seen += subject.integer_linear(torch.ones(2, 2048), torch.ones(3, 2048))
    return seen


def packed(subject: Any) -> object:
    """Packed bytes of codes, what comes back, and the codes afterwards."""
    seen: list[object] = []
    for shape in ((64, 64), (65, 128), (4, 4)):
        codes = torch.randint(-1, 2, shape, generator=_generator(5)).to(torch.int8)
        data = subject.pack(codes)
        seen += [data, codes, subject.unpack(data, shape[0])]
    return seen


def built(subject: Any) -> object:
    """Each model: its specification, tensors, outputs in both modes, and effective weights."""
    seen: list[object] = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=3)
        batch = subject.example_batch(task, batch_size=5, seed=3)
        long = batch.inputs if task == "digits" else batch.inputs.repeat(1, 4)
        seen += [subject.model_spec(task), dict(model.state_dict()), subject.loss(model, batch)]
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                seen += [_tensors_of(model(long)), dict(subject.effective_weights(model))]
    return seen


def _tensors_of(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [part for part in parts if isinstance(part, Tensor)]  # type: ignore[attr-defined]


def gradients(subject: Any) -> object:
    """The gradient of the loss in every parameter of each model."""
    seen: list[object] = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=3)
        subject.loss(model, subject.example_batch(task, batch_size=5, seed=3)).backward()
        seen.append({name: p.grad for name, p in model.named_parameters()})
    return seen


def trained(subject: Any, task: str = "digits", **options: Any) -> object:
    """A short training: records of the steps, the state after it, and its evaluation."""
    session = subject.session(task, TrainOptions(**{"steps": STEPS, **options}))
    records = [session.step() for _ in range(STEPS)]
    return [_record(r) for r in records], dict(session.state_tensors()), dict(session.evaluate())


def resumed(subject: Any, task: str = "digits") -> object:
    """A short training that is saved and taken up again half way."""
    options = TrainOptions(steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        session = subject.session(task, options)
        for _ in range(STEPS // 2):
            session.step()
        subject.save_session(session, Path(folder) / "checkpoint")
        kept = dict(session.state_tensors())
        again = subject.resume_session(task, options, Path(folder) / "checkpoint")
        found = dict(again.state_tensors())
        records = [_record(again.step()) for _ in range(STEPS - STEPS // 2)]
        return kept, found, records, dict(again.state_tensors())


def exported(subject: Any, task: str = "digits") -> object:
    """The package of a short training: every file, what it scores, and the session after it."""
    session = subject.session(task, TrainOptions(steps=STEPS))
    for _ in range(STEPS):
        session.step()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subject.export_package(session, package)
        files = sorted(path for path in package.rglob("*") if path.is_file())
        content = {str(path.relative_to(package)): path.read_bytes() for path in files}
        score = dict(subject.evaluate_package(task, package))
    return content, score, dict(session.evaluate()), dict(session.state_tensors())


def data(subject: Any) -> object:
    """Data of each task: description, digest, orders, labels, and batches of both splits."""
    seen: list[object] = []
    for task in subject.tasks():
        seen += [subject.data_info(task), subject.data_digest(task)]
        for split in ("train", "validation"):
            ids = list(range(24))
            batch = subject.batch(task, split, ids)
            seen += [list(subject.sample_contents(task, split, ids)), batch.inputs, batch.targets]
            seen += [list(subject.labels(task, split)), list(subject.documents(task, split))]
        for epoch in (0, 1):
            for rank in (0, 1):
                order = subject.epoch_order(task, seed=0, epoch=epoch, rank=rank, world_size=2)
                seen.append(list(order))
            seen.append(list(subject.epoch_order(task, seed=0, epoch=epoch)))
    return seen


def _record(record: Any) -> object:
    """A step's record without its times."""
    if is_dataclass(record) and not isinstance(record, type):
        record = {field.name: getattr(record, field.name) for field in fields(record)}
    return {k: v for k, v in dict(record).items() if not str(k).startswith("second")}
