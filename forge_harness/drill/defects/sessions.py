"""What the defects of training share: sessions with a hook put in, and what shows in them.

No defects here: `backward`, `steps`, `checkpoints` and `evaluation` are built with it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from forge_harness.model import BitLinear
from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession

Patch = Callable[[Any], None]
"""Changes a session in place."""
SubjectT = TypeVar("SubjectT", bound=ReferenceSubject)


class SessionDefect(ReferenceSubject):
    """Sessions changed by a function: new and resumed ones, resumed ones alone, or by saving."""

    def __init__(
        self,
        patch: Patch | None = None,
        *,
        resumed: Patch | None = None,
        saving: Patch | None = None,
    ) -> None:
        self.patch = patch or _nothing
        self.resumed = resumed or _nothing
        self.saving = saving or _nothing

    def session(self, task: str, options: TrainOptions) -> Any:
        """A new session, changed."""
        session = super().session(task, options)
        self.patch(session)
        return session

    def save_session(self, session: Any, path: Path) -> None:
        """Saves as the reference does, and changes the session by it."""
        super().save_session(session, path)
        self.saving(session)

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        """A session taken up again, changed."""
        session = super().resume_session(task, options, path)
        self.patch(session)
        self.resumed(session)
        return session


def _nothing(_: Any) -> None:
    pass


def with_digits_alone(subject: SubjectT) -> SubjectT:
    """Takes a subject's other task away, for a defect that shows in the cheapest."""
    vars(subject)["tasks"] = lambda: ("digits",)
    return subject


def of_text(patch: Patch) -> Patch:
    """Returns a patch of sessions of the text task alone, where the cheapest shows nothing."""

    def patch_text(session: Any) -> None:
        if session.task == "bytes":
            patch(session)

    return patch_text


def before_each_step(change: Patch) -> Patch:
    """Returns a patch that changes the session before each step of its optimizer."""

    def patch(session: Any) -> None:
        session.optimizer.register_step_pre_hook(lambda *_: change(session))

    return patch


def as_kind(kind: type[QATSession]) -> Patch:
    """Returns a patch that makes a session one of a subclass."""

    def patch(session: Any) -> None:
        session.__class__ = kind

    return patch


def reports(**changes: Callable[[Any], Any]) -> Patch:
    """Returns a patch that passes fields of the step records through functions."""

    def patch(session: Any) -> None:
        stepping = session.step

        def step() -> Any:
            record = stepping()
            new = {name: change(getattr(record, name)) for name, change in changes.items()}
            return replace(record, **new)

        session.step = step

    return patch


def ternary_layers(model: nn.Module) -> list[BitLinear]:
    """Returns the ternary layers of a reference model."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def largest(session: Any) -> Tensor:
    """Returns the parameter of a session with the most elements."""
    parameter: Tensor = max(session.model.parameters(), key=torch.Tensor.numel)
    return parameter


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of a model's parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Writes values into a model's parameters."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


@contextmanager
def in_place_of(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within the block the model's parameters have other values."""
    kept = copies(model)
    put(model, values)
    try:
        yield
    finally:
        put(model, kept)


@torch.no_grad()
def round_to_bf16(session: Any) -> None:
    """Rounds every parameter of a session to bf16."""
    for parameter in session.model.parameters():
        parameter.copy_(parameter.bfloat16().float())


# Observables of sessions, beside those of `observe`


def clock(subject: Any) -> bool:
    """Whether a step takes half as long again as it says, in the median of nine."""
    session = subject.session("digits", TrainOptions(steps=12))
    shares = []
    for _ in range(12):
        start = time.perf_counter()
        record = session.step()
        shares.append((time.perf_counter() - start) / record.seconds)
    return bool(statistics.median(shares[3:]) > 1.5)


def text_trained(subject: Any, **options: Any) -> object:
    """Two steps of the text task, and the state after them."""
    session = subject.session("bytes", TrainOptions(steps=4, batch_size=6, **options))
    losses = [session.step().loss for _ in range(2)]
    return losses, dict(session.state_tensors())


def plan(subject: Any) -> object:
    """The planned schedule of a run."""
    steps = subject.planned_schedule("digits", TrainOptions(steps=40))
    return [(step.learning_rate, step.weight_decay) for step in steps]


def moves_without_rate(subject: Any) -> bool:
    """Whether weights move in a step before which all rates of the optimizer are set to zero."""
    session = subject.session("digits", TrainOptions(steps=2))

    def stop(optimizer: Any, *_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    session.optimizer.register_step_pre_hook(stop)
    before = copies(session.model)
    session.step()
    after = copies(session.model)
    return any(not torch.equal(before[name], after[name]) for name in before)


def after_infinity(
    subject: Any, *, place: str, accumulation: int = 1, task: str = "digits"
) -> object:
    """What the third step says, and which weights it moves, with an infinity put in.

    Only counts are returned: models with other names do not differ by them.

    Args:
        subject: The subject.
        place: "gradient": of the last parameter; "inputs": of the first batch that is read.
        accumulation: Micro-batches a step.
        task: What is trained.
    """
    session = subject.session(task, TrainOptions(steps=4, accumulation=accumulation))
    session.step(), session.step()
    before = copies(session.model)
    if place == "gradient":
        *_, last = (p for p in session.model.parameters() if p.requires_grad)
        handle = last.register_hook(lambda gradient: gradient + math.inf)
    else:
        first = next(m for m in session.model.modules() if isinstance(m, BitLinear))
        handle = first.register_forward_hook(_Once())
    said = _said(session)
    handle.remove()
    after = copies(session.model)
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    return said, moved > 0, said == "finite" or _said(session)


class _Once:
    """A forward hook whose first answer is infinite."""

    used = False

    def __call__(self, _: object, __: object, out: Tensor) -> Tensor | None:
        first, self.used = not self.used, True
        return out * math.inf if first else None


def _said(session: Any) -> str:
    try:
        record = session.step()
    except Exception as error:  # Named: what raises differs from what goes on in silence.
        return type(error).__name__
    return "finite" if math.isfinite(record.loss) and math.isfinite(record.grad_norm) else "not"


def seeds(subject: Any) -> object:
    """Whether one seed gives the same model twice."""
    one, two = (copies(subject.build_model("digits", seed=5)) for _ in range(2))
    return all(torch.equal(one[name], two[name]) for name in one)


def order_of_a_rank(subject: Any) -> Sequence[int]:
    """The samples of the second epoch, asked for in a process that is a rank."""
    with _as_rank():
        order = subject.epoch_order("digits", seed=0, epoch=1, rank=0, world_size=2)
        return [int(index) for index in order]


@contextmanager
def _as_rank() -> Iterator[None]:
    kept = os.environ.get("RANK")
    os.environ["RANK"] = "0"
    try:
        yield
    finally:
        os.environ.pop("RANK")
        if kept is not None:
            os.environ["RANK"] = kept
