"""Packed inference that is slow, large or another model, and training that costs what it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from forge_harness.drill.defect import Defect, Stage
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.quant import TernaryLinearOp
from forge_harness.subject.reference import ReferenceSubject

from .steps_runs import OneSetting

Form = Literal["packed", "full"]


class PackedDefect(ReferenceSubject):
    """Packed models changed by `change(model, trained)`, where `trained` makes their original."""

    def __init__(self, change: Callable[[nn.Module, Callable[[], nn.Module]], None]) -> None:
        self.change = change

    def inference_model(self, task: str, form: Form, *, seed: int) -> nn.Module:
        """See `InfersPacked.inference_model`."""
        model = super().inference_model(task, form, seed=seed)
        if form == "packed":
            self.change(model, lambda: self.build_model(task, seed=seed))
        return model


class FullInDouble(ReferenceSubject):
    """The full-precision twin of the text model is in float64: twice as large, and slower."""

    def inference_model(self, task: str, form: Form, *, seed: int) -> nn.Module:
        """See `InfersPacked.inference_model`."""
        model = super().inference_model(task, form, seed=seed)
        return model.double() if (form, task) == ("full", "bytes") else model


class PacksAnotherModel(ReferenceSubject):
    """The packed model is not the one that was trained."""

    def inference_model(self, task: str, form: Form, *, seed: int) -> nn.Module:
        """See `InfersPacked.inference_model`."""
        return super().inference_model(task, form, seed=seed + (form == "packed"))


class SavesFakeQuantized(ReferenceSubject):
    """Training keeps dequantized weights and activations for the backward, beside the latents."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Quantizes.linear`."""
        return TernaryLinearOp(compute="fake")(x * 1.0, weight * 1.0, bias)


class StepDefect(OneSetting):
    """Steps of ternary training changed by `step(sound)`."""

    def __init__(self, step: Callable[[Callable[[], StepRecord]], StepRecord]) -> None:
        self.step = step

    def session(self, task: str, options: TrainOptions) -> Any:
        """See `Trains.session`."""
        session = super().session(task, options)
        if options.precision == "ternary":
            session.step = partial(self.step, session.step)
        return session


def inferred(subject: Any) -> object:
    """Answers of packed and full models, and the names and bytes of what they hold."""
    seen: list[object] = []
    for task in ("digits", "bytes"):
        batch = subject.example_batch(task, batch_size=5, seed=9)
        for form in ("packed", "full"):
            model = subject.inference_model(task, form, seed=9)
            with torch.inference_mode():
                seen.append(model(batch.inputs))
            seen += [sorted(model.state_dict()), sorted(vars(model)), sorted(model._buffers)]
    return seen


def answered_again(subject: Any) -> object:
    """Two answers of a packed model to one batch."""
    model = subject.inference_model("digits", "packed", seed=9)
    inputs = subject.example_batch("digits", batch_size=3, seed=9).inputs
    with torch.inference_mode():
        return [model(inputs), model(inputs)]


def waits(subject: Any) -> object:
    """How long a packed model sleeps while it answers."""
    model = subject.inference_model("digits", "packed", seed=9)
    inputs = subject.example_batch("digits", batch_size=1, seed=9).inputs
    with torch.inference_mode(), _sleeps() as asked:
        model(inputs)
    return asked


@contextmanager
def _sleeps() -> Iterator[list[float]]:
    """Notes what sleeps are asked for instead of sleeping: measured time never repeats."""
    asked: list[float] = []
    with mock.patch.object(time, "sleep", asked.append):
        yield asked


def saved(subject: Any) -> object:
    """Shapes and types of what one linear layer keeps for its backward."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    kept: list[object] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append([str(tensor.dtype), list(tensor.shape)])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        subject.linear(x, weight)
    return kept


def steps_reported(subject: Any) -> object:
    """The samples of some steps, and how often they sleep."""
    session = subject.session("digits", TrainOptions(steps=3))
    with _sleeps() as asked:
        records = [session.step() for _ in range(3)]
    return [[list(record.sample_ids) for record in records], len(asked)]


def _waits_before_it_answers(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))


def _keeps_what_it_was_made_from(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    model.latents = trained()


def _keeps_decoded(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """In an attribute that torch does not look at."""
    weights = [w.clone() for w in ReferenceSubject().effective_weights(trained()).values()]
    holder: Any = model
    holder.cache = {"weights": weights}


def _decodes_when_called(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """At the first call, and keeps it."""
    weights = ReferenceSubject().effective_weights(trained())

    def decode(module: nn.Module, args: Any) -> None:
        for index, weight in enumerate(weights.values()):
            module.register_buffer(f"decoded_{index}", weight.clone(), persistent=False)

    model.register_forward_pre_hook(decode)


def _each_scale(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """Changes the scale of every packed layer."""

    def changed(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("scale"):
                    buffer.copy_(change(buffer))

    return changed


def _layers_swapped(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """Layers of one shape are read in the order of their names, last first."""
    alike: dict[tuple[int, ...], list[Tensor]] = {}
    for name, buffer in model.named_buffers():
        if name.endswith("data"):
            alike.setdefault(tuple(buffer.shape), []).append(buffer)
    for buffers in alike.values():
        for buffer, other in zip(buffers, [b.clone() for b in buffers[::-1]], strict=True):
            buffer.copy_(other)


def _right_at_first(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """From the second answer on, rows are those of a neighbour."""
    answered: list[bool] = []

    def later(module: nn.Module, args: Any, found: Tensor) -> Tensor:
        answered.append(True)
        return found if len(answered) == 1 else found.roll(1, 0)

    model.register_forward_hook(later)


def _nothing_after_the_first(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """From the second answer on, no logit is a number."""
    answered: list[bool] = []

    def later(module: nn.Module, args: Any, found: Tensor) -> Tensor:
        answered.append(True)
        return found if len(answered) == 1 else torch.full_like(found, torch.nan)

    model.register_forward_hook(later)


def _wrong_from_four_rows(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """Batches of four and more are answered with the row of a neighbour."""
    model.register_forward_hook(
        lambda module, args, found: found.roll(1, 0) if len(found) >= 4 else found
    )


def _wrong_alone(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """The path of a single row mirrors the logits."""
    model.register_forward_hook(
        lambda module, args, found: found.flip(-1) if len(found) == 1 else found
    )


def _last_of_an_odd_batch(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """The row that fills no pair is answered as the one before it."""

    def paired(module: nn.Module, args: Any, found: Tensor) -> Tensor:
        if len(found) < 3 or len(found) % 2 == 0:
            return found
        return torch.cat([found[:-1], found[-2:-1]])

    model.register_forward_hook(paired)


def _one_token_at_a_time(model: nn.Module, trained: Callable[[], nn.Module]) -> None:
    """Sequences of one token, as decoding gives them, are answered with the logits mirrored."""

    def alone(module: nn.Module, args: Any, found: Tensor) -> Tensor:
        return found.flip(-1) if found.dim() == 3 and found.shape[1] == 1 else found

    model.register_forward_hook(alone)


def one_row_and_one_token(subject: Any) -> object:
    """Answers of the packed text model to one row, to five, and to one token."""
    model = subject.inference_model("bytes", "packed", seed=9)
    inputs = subject.example_batch("bytes", batch_size=5, seed=9).inputs
    with torch.inference_mode():
        return [model(inputs), model(inputs[:1]), model(inputs[:4, :1])]


def _waits_for_data(step: Callable[[], StepRecord]) -> StepRecord:
    """Twice as long as it computes: no processor time, but time."""
    start = time.perf_counter()
    record = step()
    time.sleep(2 * (time.perf_counter() - start))
    return record


def _half_of_the_batch(step: Callable[[], StepRecord]) -> StepRecord:
    record = step()
    return replace(record, sample_ids=record.sample_ids[::2])


_packed = partial(Defect, stage=Stage.KERNEL, alive=inferred)
_throughput = partial(
    Defect,
    stage=Stage.TRAINING,
    check="performance.training_throughput",
    shows="throughput_ratio is",
    alive=steps_reported,
)

DEFECTS = (
    _packed(
        id="waits_before_it_answers",
        title="Packed inference waits twenty milliseconds before each answer",
        check="performance.inference_speedup",
        shows="inference_speedup is",
        subject=lambda: PackedDefect(_waits_before_it_answers),
        alive=waits,
        subtlety=3,
    ),
    _packed(
        id="packs_another_model",
        title="The packed model is not the one that was trained",
        check="performance.inference_speedup",
        shows="difference is",
        subject=PacksAnotherModel,
        subtlety=3,
    ),
    _packed(
        id="K03_packed_wrong_in_batches",
        title="Packed inference is right for up to three rows, and mixes rows from four on",
        check="performance.inference_speedup",
        shows="difference is",
        subject=lambda: PackedDefect(_wrong_from_four_rows),
        source="microsoft/BitNet#617",
        subtlety=3,
    ),
    _packed(
        id="K03_packed_wrong_alone",
        title="Packed inference is right for batches, and mirrors the logits of a single row",
        check="performance.inference_speedup",
        shows="difference_by_shape is",
        subject=lambda: PackedDefect(_wrong_alone),
        alive=one_row_and_one_token,
        subtlety=3,
    ),
    _packed(
        id="K03_packed_odd_row",
        title="Packed inference takes rows in pairs, and repeats one for the row left over",
        check="performance.inference_speedup",
        shows="difference_by_shape is",
        subject=lambda: PackedDefect(_last_of_an_odd_batch),
        alive=one_row_and_one_token,
        subtlety=4,
    ),
    _packed(
        id="K03_packed_wrong_in_decoding",
        title="Packed inference of a single token mirrors the logits",
        check="performance.inference_speedup",
        shows="bytes.difference_by_shape is",
        subject=lambda: PackedDefect(_one_token_at_a_time),
        alive=one_row_and_one_token,
        subtlety=3,
    ),
    _packed(
        id="K12_packed_right_at_first",
        title="The first answer of a packed model is right, later ones mix rows",
        check="performance.inference_speedup",
        shows="difference is",
        subject=lambda: PackedDefect(_right_at_first),
        alive=answered_again,
        source="ggml-org/ggml 37c4997a",
        subtlety=4,
    ),
    _packed(
        id="K17_packed_not_a_number_later",
        title="The first answer of a packed model is right, later ones are not numbers",
        check="performance.inference_speedup",
        shows="difference is nan",
        subject=lambda: PackedDefect(_nothing_after_the_first),
        alive=answered_again,
        subtlety=3,
    ),
    _packed(
        id="full_twin_in_float64",
        title="The full-precision twin is in float64: every ratio to it is flattered",
        check="performance.compression",
        shows="full_bytes_per_parameter is",
        subject=FullInDouble,
        subtlety=4,
    ),
    _packed(
        id="P14_packed_scales_rounded",
        title="Scales of the packed model have the precision of bfloat16",
        check="performance.inference_speedup",
        shows="difference is",
        subject=lambda: PackedDefect(_each_scale(lambda scale: scale.bfloat16().float())),
        source="microsoft/BitNet gpu/convert_checkpoint.py",
        subtlety=5,
    ),
    _packed(
        id="Q03_packed_divides_by_its_scale",
        title="The packed model multiplies with the reciprocal of each scale",
        check="performance.inference_speedup",
        shows="difference is",
        subject=lambda: PackedDefect(_each_scale(lambda scale: 1 / scale)),
        source="microsoft/BitNet#616",
        subtlety=2,
    ),
    _packed(
        id="packed_layers_swapped",
        title="Packed layers of one shape have each other's codes",
        check="performance.inference_speedup",
        shows="difference is",
        subject=lambda: PackedDefect(_layers_swapped),
        subtlety=3,
    ),
    _packed(
        id="keeps_what_it_was_made_from",
        title="The packed model still holds the latent weights",
        check="performance.compression",
        shows="resident_ratio is",
        subject=lambda: PackedDefect(_keeps_what_it_was_made_from),
        subtlety=3,
    ),
    _packed(
        id="keeps_decoded_weights",
        title="The packed model keeps its decoded weights where torch does not look",
        check="performance.compression",
        shows="resident_ratio is",
        subject=lambda: PackedDefect(_keeps_decoded),
        subtlety=4,
    ),
    _packed(
        id="decodes_when_called",
        title="The packed model decodes its weights at the first call and keeps them",
        check="performance.compression",
        shows="resident_ratio is",
        subject=lambda: PackedDefect(_decodes_when_called),
        subtlety=4,
    ),
    Defect(
        id="saves_fake_quantized",
        title="Dequantized weights and activations are kept for the backward beside the latents",
        stage=Stage.BACKWARD,
        check="performance.peak_memory",
        shows="saved_ratio is",
        subject=SavesFakeQuantized,
        alive=saved,
        subtlety=3,
    ),
    _throughput(
        id="waits_for_data",
        title="Each ternary step waits for its data twice as long as it computes",
        subject=lambda: StepDefect(_waits_for_data),
        subtlety=3,
    ),
    _throughput(
        id="steps_over_half_the_batch",
        title="Ternary steps take their time and get through half of the samples",
        subject=lambda: StepDefect(_half_of_the_batch),
        subtlety=4,
    ),
)
