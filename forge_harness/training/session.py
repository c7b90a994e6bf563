"""The QAT trainer: one optimizer step at a time, interruptible anywhere between two."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from forge_harness.errors import ConfigError, ForgeError, NonFiniteError, UsageError
from forge_harness.protocols import Batch, ScheduleSpec, StepRecord, TrainOptions
from forge_harness.training.compilation import Compiled
from forge_harness.training.data import CanaryData, DataSource
from forge_harness.training.digests import tensors_digest
from forge_harness.training.evaluation import evaluate_model
from forge_harness.training.ingredients import (
    BuildModel,
    Loss,
    ingredients,
    scale_residual_outputs,
    set_compute,
    training_loss,
)
from forge_harness.training.model_record import model_record
from forge_harness.training.optimize import (
    apply_schedule,
    build_optimizer,
    clip_gradients,
    gradient_norm,
)
from forge_harness.training.position import DataPosition
from forge_harness.training.randomness import RandomState
from forge_harness.training.ranks import DistributedError, OneProcess, Ranks, check_spread, whole
from forge_harness.training.recipe import Recipe, resolve_recipe
from forge_harness.training.recipe_kinds import plain_options
from forge_harness.training.schedule import schedule_at


class QATSession:
    """A training run of one model (implements `TrainingSession`).

    Deterministic: same options, same bits, whatever else the process does with its random
    generators; with eager execution also whatever the number of threads (measured for 1 and 2).

    After `step`, gradients are left in place as the optimizer saw them: clipped, over the whole
    batch. They are cleared when the next step begins.

    Args:
        task: `digits` or `bytes`, a variant allowed, or what the parts given understand.
        options: What to change of the recipe.
        build_model: Builds the model from (task, seed, precision); None: the reference model.
        load: Source of the data; None: the reference data.
        loss: Training loss of (model, batch); None: cross-entropy.
        initial_weights: State dict to start from, for fine-tuning a full-precision model.
        ranks: Processes the step is spread over; all make the same calls. None: this one.

    Attributes:
        task: As given.
        options: As given, with Python's own numbers.
        recipe: What the options came to.
        model: The model that is trained.
        optimizer: AdamW over its parameters.
        step_index: Optimizer steps made so far.
        data: Source of the samples, canaries included.
        ranks: As given.

    Raises:
        ConfigError: An option is unknown or out of its range, or does not fit the ranks.
        UsageError: The model has state no checkpoint can hold.
        DistributedError: The ranks built different models.
    """

    def __init__(
        self,
        task: str,
        options: TrainOptions,
        *,
        build_model: BuildModel | None = None,
        load: DataSource | None = None,
        loss: Loss | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        parts = ingredients(build_model, load, loss)
        self.task = task
        self.options = options = plain_options(options)
        self.ranks = ranks or OneProcess()
        self.recipe = self.ranks.everywhere(self._resolved)
        self.schedule: ScheduleSpec = self.recipe.schedule_spec(options.steps)
        self.step_index = 0
        self.data = parts.data
        if options.validation_canaries:
            self.data = CanaryData(parts.data, task, options.validation_canaries)
        self.random = RandomState(options.seed)
        self.position = DataPosition(self.data, task, options.seed)
        self._build_model = parts.build_model
        self.model = self.ranks.everywhere(lambda: self._built(initial_weights))
        self._refuse_different_models()
        # Sharding changes the model's type, by which it is known.
        self._record = model_record(self.model) if self.ranks.shards else None
        self._forward = self.ranks.wrap(self.model)
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model, self.recipe)
        self._parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        if self.recipe.compile:
            self._forward = cast(nn.Module, torch.compile(self._forward))
        self._loss = parts.loss or partial(
            training_loss, label_smoothing=self.recipe.label_smoothing
        )

    def step(self) -> StepRecord:
        """Makes one optimizer step.

        Raises:
            NonFiniteError: The loss or a gradient is not finite. Weights, optimizer, random
                state and data position are as before the step.
            ForgeError: All steps of the schedule are made.
        """
        started = time.perf_counter()
        if self.step_index >= self.options.steps:
            raise ForgeError(
                f"All {self.options.steps} steps of this session are made; ask for more steps in "
                "its options."
            )
        ids = self.options.fixed_batch or self.position.peek(self.recipe.batch_size)
        micro_batches = self._split(ids)
        with self.random.active(), self._compiled():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._accumulate(micro_batches)
            norm = gradient_norm(self._parameters)
            self._refuse_non_finite(loss, norm)
            if self.recipe.clip_norm:
                clip_gradients(self._parameters, norm, self.recipe.clip_norm)
            now = schedule_at(self.schedule, self.step_index)
            apply_schedule(self.optimizer, now)
            self.optimizer.step()
        if not self.options.fixed_batch:
            self.position.advance(len(ids))
        self.step_index += 1
        return StepRecord(
            step=self.step_index - 1,
            loss=loss,
            learning_rate=now.learning_rate,
            weight_decay=now.weight_decay,
            grad_norm=norm,
            sample_ids=tuple(index for micro in micro_batches for index in micro),
            seconds=time.perf_counter() - started,
        )

    def evaluate(self) -> dict[str, float]:
        """Returns `loss` (nats) and `accuracy` (share) on the validation split.

        The model computes as in training, quantized where it is. Nothing the training depends
        on moves.
        """
        with self.random.active():
            result = evaluate_model(self.model, self.data, self.task, ranks=self.ranks)
        return {"loss": result.loss, "accuracy": result.accuracy}

    def refuse_divergence(self) -> None:
        """Refuses to go on where ranks that hold a whole model each hold different ones.

        Raises:
            DistributedError: They do, on all of them.
        """
        if not self.ranks.shards:
            self._refuse_different_models()

    def _refuse_different_models(self) -> None:
        if self.ranks.world_size == 1:
            return
        different = set(self.ranks.exchange(tensors_digest(self.model.state_dict())))
        if len(different) != 1:
            raise DistributedError(
                f"After {self.step_index} steps the {self.ranks.world_size} ranks hold "
                f"{len(different)} different models, and should hold one; look at what differs "
                "between them: machine, torch, or a model that is not built from its seed alone. "
                "--resume goes on from the last checkpoint, if there is one."
            )

    def model_record(self) -> dict[str, Any] | None:
        """Returns `model_record` of the model."""
        return self._record or model_record(self.model)

    def whole_model(self) -> nn.Module:
        """Returns the model with all rows of its weights; only rank 0 may use it.

        Where the model is sharded it is another one, made by all ranks together.
        """
        if not self.ranks.shards:
            return self.model
        state = {}
        for name, value in self.model.state_dict().items():
            full = whole(value.detach()).cpu()
            if self.ranks.rank == 0:
                state[name] = full
        if self.ranks.rank:
            return self.model
        with self.random.active():
            model = self._build_model(self.task, self.options.seed, self.options.precision)
        self._set_compute(model)
        model.load_state_dict(state, strict=True)
        return model

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns copies of all the future of the run depends on, by a stable name.

        Of a sharded session they are DTensors, with the rows of this rank.
        """
        state = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        state |= {f"buffer.{key}": value for key, value in self._volatile().items()}
        state |= self._optimizer_tensors()
        state |= {f"random.{key}": value for key, value in self.random.tensors().items()}
        position = [self.step_index, self.position.epoch, self.position.offset]
        state["position"] = torch.tensor(position, dtype=torch.int64)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state written by `state_tensors` of a session of the same options.

        Raises:
            RuntimeError: Model weights are missing, left over or of another shape.
            KeyError: Another tensor is missing.
        """
        own = self.model.state_dict()
        weights = {
            name: self.ranks.rows_of(value, own[name]) if name in own else value
            for name, value in _below("model.", state).items()
        }
        self.model.load_state_dict(weights, strict=True)
        for name, value in _below("buffer.", state).items():
            self._load_buffer(name, value)
        self.random.load(_below("random.", state))
        for name, parameter in self._named_parameters():
            fields = _below(f"optimizer.{name}/", state)
            if fields:
                self.optimizer.state[parameter] = {
                    key: _laid_out_like(parameter, self.ranks.rows_of(value, parameter))
                    for key, value in fields.items()
                }
        step, epoch, offset = (int(value) for value in state["position"])
        self.step_index, self.position.epoch, self.position.offset = step, epoch, offset
        if step:
            apply_schedule(self.optimizer, schedule_at(self.schedule, step - 1))

    def _refuse_unsavable(self) -> None:
        """A checkpoint that cannot be written would lose the steps before it."""
        for name, value in (self.model.state_dict() | self._volatile()).items():
            kind = f"a {type(value).__name__}"
            if isinstance(value, Tensor):
                if value.layout == torch.strided and _is_storable(value.dtype):
                    continue
                kind = f"a tensor of {value.dtype}, {value.layout}"
            raise UsageError(
                f"The state of the model of {self.task!r} holds {kind} as {name!r}, and a "
                "checkpoint holds dense tensors only; encode it as one, for extra state in "
                "get_extra_state, or leave it out of the state dict."
            )

    def _volatile(self) -> dict[str, Tensor]:
        """Buffers the state dict leaves out; a forward may change them as it does any other."""
        saved = self.model.state_dict(keep_vars=True)
        found = {n: b for n, b in self.model.named_buffers() if n not in saved and not b.is_meta}
        return {
            name: torch.view_as_real(buffer.resolve_conj()) if buffer.is_complex() else buffer
            for name, buffer in found.items()
        }

    def _load_buffer(self, name: str, value: Tensor) -> None:
        buffer = dict(self.model.named_buffers(remove_duplicate=False)).get(name)
        if buffer is not None and buffer.is_complex():
            value = torch.view_as_complex(value)
        if buffer is None or buffer.shape != value.shape or not buffer.is_contiguous():
            # A cache that grew, or was not there yet.
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, value.clone())
        else:
            buffer.copy_(value)

    def _resolved(self) -> Recipe:
        recipe = resolve_recipe(self.task, self.options)
        check_spread(recipe.batch_size, self.options.accumulation, self.ranks.world_size)
        return recipe

    def _built(self, initial_weights: Mapping[str, Tensor] | None) -> nn.Module:
        """Builds the model as training begins with it, in this process alone."""
        if self.recipe.compile and self.ranks.shards:
            raise ConfigError(
                "compile with sharded weights is not offered; leave one of the two out.",
                key="compile",
            )
        with self.random.active():
            self.model = self._build_model(self.task, self.options.seed, self.options.precision)
        self._refuse_unsavable()
        if initial_weights is not None:
            self.model.load_state_dict(initial_weights, strict=True)
        elif self.recipe.residual_gain != 1.0:
            scale_residual_outputs(self.model, self.recipe.residual_gain)
        self._set_compute(self.model)
        return self.model.train().to(self.ranks.device)

    def _set_compute(self, model: nn.Module) -> None:
        compute = self.recipe.compute
        ternary = self.options.precision == "ternary"
        if compute is not None and ternary and not set_compute(model, compute):
            raise ConfigError(
                f"compute {compute!r} was asked for, but no layer of the model of {self.task!r} "
                "uses TernaryLinearOp; leave compute unset.",
                key="compute",
            )

    def _split(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Strided, so that a micro-batch holds what a rank of a distributed sampler would."""
        count = max(self.options.accumulation, self.ranks.world_size)
        return [tuple(ids[index::count]) for index in range(count)]

    def _accumulate(self, micro_batches: Sequence[tuple[int, ...]]) -> float:
        """Leaves the gradient of the mean over all targets; returns that mean."""
        mine = micro_batches[self.ranks.rank :: self.ranks.world_size]
        if self.ranks.world_size == 1:
            mine = [ids for ids in mine if ids]
        # An empty one takes part with weight 0: the other ranks wait for its backward.
        batches = [self.data.batch(self.task, "train", ids or micro_batches[0]) for ids in mine]
        sizes = [
            batch.targets.numel() if ids else 0 for batch, ids in zip(batches, mine, strict=True)
        ]
        total = sum(self.ranks.gather(float(sum(sizes))))
        losses = 0.0
        for index, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            share = size / total
            with self.ranks.accumulating(last=index == len(batches) - 1):
                with self._autocast():
                    loss = self._loss(self._forward, self._placed(batch))
                (loss * share).backward()  # type: ignore[no-untyped-call]
            losses += float(loss.detach()) * share
        return sum(self.ranks.gather(losses))

    def _placed(self, batch: Batch) -> Batch:
        device = self.ranks.device
        if device.type == "cpu":
            return batch
        return Batch(inputs=batch.inputs.to(device), targets=batch.targets.to(device))

    def _refuse_non_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"Step {self.step_index} has loss {loss:g} and gradient norm {norm:g}; both must be "
            "finite. Nothing was updated: look at this step's samples or lower the learning rate."
        )

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.recipe.autocast:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def _compiled(self) -> AbstractContextManager[object]:
        return Compiled() if self.recipe.compile else nullcontext()

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        known = {id(parameter) for parameter in self._parameters}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) in known]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"optimizer.{name}/{field}": torch.as_tensor(value)
            for name, parameter in self._named_parameters()
            for field, value in self.optimizer.state.get(parameter, {}).items()
        }


@cache
def _is_storable(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors has a name for a dtype."""
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Copies a value into the parameter's memory format, in whose order kernels compute."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
