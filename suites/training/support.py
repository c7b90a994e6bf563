"""What the checks of this suite share: watching an optimizer, independent gradients, digests.

Nothing here needs the cooperation of the subject's loop: gradients are read, and faults injected,
through torch's hooks on tensors and optimizers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from forge_harness import oracles
from forge_harness.errors import SubjectError
from forge_harness.probes.wrapped import inner_model
from forge_harness.subject.protocols import TrainOptions

from .augmented import put_in_place
from .rerun import Outcome
from .rerun import digests as digests
from .states import copied, copied_parameters, load_state

GAINS = frozenset({"weight", "gain", "gamma", "alpha", "scale"})
"""What vectors and numbers are called that multiply; biases begin at zero as a rule, and add."""
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})
"""What torch's wrappers put into names of layers: DDP, `compile` and activation checkpointing."""
MOST_SETTLING = 4
"""Steps after which two layers of zeros in a row have moved, and a warmup from zero has begun."""
_LARGE_DATA = 20_000
"""Samples above which an eighth of an epoch is too much for one step of a check."""


def cheapest(subject: Any) -> str:
    """Returns the task that checks train for longer: the first the subject names."""
    return tasks(subject)[0]


def others(subject: Any) -> Sequence[str]:
    """Returns the tasks that are not the cheapest: they are trained for a few steps."""
    return tasks(subject)[1:]


def only_cheapest(subject: Any, evidence: Any) -> str:
    """Returns the cheapest task, and says which tasks that leaves out."""
    task, *left_out = tasks(subject)
    evidence.record("task", task, reason=f"the only one looked at; left out: {shown(left_out)}")
    return task


def tasks(subject: Any) -> Sequence[str]:
    """Returns all tasks; skips the check when the subject names none."""
    if not callable(getattr(subject, "tasks", None)):
        pytest.skip("the subject does not name its tasks (BuildsModel.tasks)")
    return list(subject.tasks())


def train_size(subject: Any, task: str) -> int | None:
    """Returns the number of training samples, if the subject says."""
    info = getattr(subject, "data_info", None)
    return info(task).train_size if callable(info) else None


def counted(subject: Any, task: str, targets: Tensor) -> Tensor:
    """Returns which targets count, as booleans: all but `DataInfo.ignored_target`."""
    info = getattr(subject, "data_info", None)
    ignored = info(task).ignored_target if callable(info) else None
    return torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored


def short_epochs(subject: Any, task: str, *, steps: int, **changes: Any) -> TrainOptions:
    """Returns options whose run crosses an epoch border every eight steps, where that is cheap."""
    size = train_size(subject, task)
    if size is not None and size <= _LARGE_DATA:
        changes.setdefault("batch_size", math.ceil(size / 8))
    return TrainOptions(steps=steps, **changes)


def roundoff(tensor: Tensor) -> float:
    """Returns the largest relative error of storing a value in a tensor's dtype, at least fp32's.

    Stochastic rounding errs by up to twice as much.
    """
    return max(oracles.UNIT_ROUNDOFF, torch.finfo(tensor.dtype).eps / 2)


def is_coarse(tensor: Tensor) -> bool:
    """Whether a dtype keeps less than fp32 does."""
    return roundoff(tensor) > oracles.UNIT_ROUNDOFF


def cannot_show(names: Sequence[str], what: str) -> None:
    """Skips the rest of a check for parameters whose rounding exceeds what is looked for."""
    if names:
        pytest.skip(f"weights in less than fp32 cannot show {what}: {shown(names)}")


def declared_schedule(subject: Any, task: str, options: TrainOptions) -> list[oracles.Rates]:
    """Returns the rates of each step: by the formula of the declared kind, or else as planned."""
    spec = subject.schedule_spec(task, options)
    if spec.kind in oracles.KINDS:
        return oracles.schedule(spec)
    plan = subject.planned_schedule(task, options)
    return [oracles.Rates(step.learning_rate, step.weight_decay) for step in plan]


def trained_model(session: Any) -> Any:
    """Returns the model whose weights the optimizer moves: `model`, unless that holds averages."""
    return getattr(session, "trained_model", session.model)


def full_precision_steps(session: Any) -> int:
    """Returns how many steps a session trains before quantization begins: mostly none."""
    return int(getattr(session, "full_precision_steps", 0))


def optimizer_of(session: Any) -> Any:
    """Returns the optimizer that makes the steps: what another one holds and that one cannot show.

    accelerate's has the methods of torch's and not its hooks.

    Raises:
        SubjectError: There is none that torch's hooks could watch.
    """
    optimizer = session.optimizer
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise SubjectError(
                f"the session's optimizer is a {type(session.optimizer).__name__}; expected a "
                "torch.optim.Optimizer, whose steps its hooks show: derive it from that, and put "
                "several into forge_harness.subject.optimizers.Together"
            )
        optimizer = inner
    return optimizer


def before_update(session: Any, look: Callable[[Any], None]) -> Any:
    """Has `look` see the optimizer once all gradients of a step are there; returns a handle.

    A step may be given a closure that computes them, as Lightning's and that of LBFGS are. What is
    called again within one step is looked at the first time.
    """

    def hook(optimizer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        closure = given[1] if len(given) > 1 else named.get("closure")
        if closure is None:
            look(optimizer)
            return None
        looked = False

        def computed() -> Any:
            nonlocal looked
            loss = closure()
            if not looked:
                looked = True
                look(optimizer)
            return loss

        return given[:1], {**named, "closure": computed}

    return optimizer_of(session).register_step_pre_hook(hook)


class AsBuilt:
    """A session whose trained model has the parameters of `build_model` under the same names.

    That is the model inside DDP or `torch.compile(model)`; the rest is the session's own.
    """

    def __init__(self, subject: Any, task: str, session: Any) -> None:
        built = subject.build_model(task, seed=0)
        self.trained_model = inner_model(trained_model(session), built)
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def zero_factors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of matrices and gains of zeros, as some layers and branches begin.

    No gradient reaches what is behind one, until a step has moved it.
    """
    return [
        name
        for name, tensor in tensors.items()
        if (tensor.dim() > 1 or name.rpartition(".")[2] in GAINS) and not tensor.any()
    ]


def is_empty(values: Iterable[Any]) -> bool:
    """Whether a module was called with these, and among them no token, as an expert may be."""
    return any(isinstance(value, Tensor) and not value.numel() for value in values)


def settle(session: Any) -> None:
    """Makes the steps before which a factor of zeros hides the gradients of others: mostly none."""
    while session.step_index < MOST_SETTLING and zero_factors(
        {n: p for n, p in trained_model(session).named_parameters() if p.requires_grad}
    ):
        session.step()


def states_of_models(session: Any) -> dict[str, Tensor]:
    """Returns the state of the model and of the one that is trained, if that is another."""
    return {
        f"{key}.{name}": tensor
        for key, model in models_of(session).items()
        for name, tensor in model.state_dict().items()
    }


def models_of(session: Any) -> dict[str, Any]:
    """Returns the model, and the one that is trained if that is another, by their attributes."""
    models = {"model": session.model, "trained_model": trained_model(session)}
    if models["trained_model"] is session.model:
        del models["trained_model"]
    return models


def running_statistics(model: Any) -> dict[str, Tensor]:
    """Returns what norms of torch keep of the batches they saw, by the names of a state dict."""
    return {
        f"{layer}.{name}" if layer else name: tensor
        for layer, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase)
        for name, tensor in module.named_buffers(recurse=False)
    }


@dataclass(slots=True)
class Update:
    """One optimizer step as the optimizer saw it, by parameter name."""

    before: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    learning_rate: dict[str, float]
    weight_decay: dict[str, float]
    after: dict[str, Tensor] = field(default_factory=dict)
    moved_outside: list[str] = field(default_factory=list)
    """Parameters that the session's step changed before or after this; filled in by `step`."""

    def moved(self, name: str) -> Tensor:
        """Returns what the step added to a parameter."""
        return self.after[name].double() - self.before[name].double()


class Watch:
    """Records every optimizer step of a session within the block.

    Args:
        session: A `TrainingSession`.
        zero_gradients: Whether gradients are zeroed just before the optimizer reads them.
    """

    def __init__(self, session: Any, *, zero_gradients: bool = False) -> None:
        self.updates: list[Update] = []
        self._session = session
        self._zero = zero_gradients
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [
            before_update(self._session, self._before),
            optimizer_of(self._session).register_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def step(self) -> Any:
        """Makes one step of the session, whose weights are also read around the whole of it."""
        known = len(self.updates)
        states = [self._weights()]
        record = self._session.step()
        for update in self.updates[known:]:
            states += [update.before, update.after]
        states.append(self._weights())
        if len(self.updates) > known:
            pairs = list(zip(states[::2], states[1::2], strict=True))
            self.updates[-1].moved_outside = [
                name
                for name in states[0]
                if not all(torch.equal(one[name], two[name]) for one, two in pairs)
            ]
        return record

    def _weights(self) -> dict[str, Tensor]:
        return copied_parameters(trained_model(self._session))

    def _before(self, optimizer: Any) -> None:
        named = dict(trained_model(self._session).named_parameters())
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        owned = {name: group_of[id(p)] for name, p in named.items() if id(p) in group_of}
        if self._zero:
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        self.updates.append(
            Update(
                before=copied_parameters(trained_model(self._session)),
                gradients={
                    name: None if p.grad is None else copied(p.grad) for name, p in named.items()
                },
                learning_rate={name: float(group["lr"]) for name, group in owned.items()},
                weight_decay={
                    name: float(group.get("weight_decay", 0.0)) for name, group in owned.items()
                },
            )
        )

    def _after(self, *_: object) -> None:
        self.updates[-1].after = self._weights()


def independent_gradients(
    subject: Any,
    task: str,
    state: Mapping[str, Tensor],
    ids: Sequence[int],
    around: AbstractContextManager[Any],
    inputs: Tensor | None = None,
    *,
    training: bool = True,
) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and gradients of these train samples as one batch, by autograd alone.

    `around` the loss is what the session has around its own; `inputs` are what the model is given
    in place of what is read of the samples. Names are those of `state`. The model is in training
    mode or not.
    """
    model = subject.build_model(task, seed=0)
    names = _names(state, model.state_dict())
    load_state(model, {names.get(name, name): value for name, value in state.items()})
    model.train(training)
    batch = subject.batch(task, "train", list(ids))
    if inputs is not None:
        put_in_place(model, inputs)
        # Another model of the loss has them from the batch: the teacher of a distillation.
        batch = replace(batch, inputs=inputs.to(batch.inputs.device))
    with around:
        loss = subject.loss(model, batch)
    loss.backward()
    theirs = {own: name for name, own in names.items()}
    gradients = {
        theirs.get(own, own): copied(p.grad)
        for own, p in model.named_parameters()
        if p.grad is not None
    }
    return float(loss.detach()), gradients


def _names(found: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Returns for names that a wrapper lengthened, where one is, those that a fresh model has."""
    plain = {_plain(name): name for name in own}
    return {name: plain[_plain(name)] for name in found if _plain(name) in plain}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Returns the L2 norm over all tensors."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def gradient_difference(seen: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor]) -> float:
    """Returns ||seen - wanted|| / ||wanted|| over all parameters; infinite when one is missing."""
    total = off = 0.0
    for name, gradient in wanted.items():
        value = seen.get(name)
        if value is None:
            return math.inf
        total += float(gradient.double().square().sum())
        off += float((value.double() - gradient.double()).square().sum())
    return math.sqrt(off / total) if total else math.inf


def differing(one: Mapping[str, str], two: Mapping[str, str]) -> list[str]:
    """Returns the names whose digests differ or that only one side has, sorted."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def finished(result: Mapping[str, Any]) -> Outcome:
    """Returns what another process says came of its run."""
    return Outcome(*(result[name] for name in ("facts", "state", "metrics")))


def shown(names: Sequence[str]) -> str:
    """Returns at most three names, for a reason."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) + more) or "none"


def disturb_generators(seed: int) -> None:
    """Moves every generator of the process, as unrelated code would."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def steps(session: Any, count: int) -> list[Any]:
    """Makes `count` steps and returns their records."""
    return [session.step() for _ in range(count)]
