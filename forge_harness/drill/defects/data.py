"""Data that are damaged, overlap, or reach training other than they are declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import Batch, methods_of
from forge_harness.subject.reference import ReferenceSubject

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What data were asked for."""

    task: str
    split: Split = "train"
    ids: Sequence[int] = ()

    @property
    def sound(self) -> ReferenceSubject:
        """The data as they ought to be."""
        return ReferenceSubject()


Change = Callable[[Any, Asked], Any]
"""Gets what was asked for and the question, and returns what is delivered instead."""


class DataDefect(ReferenceSubject):
    """Data with some answers changed; `changes` go by the name of the protocol's method."""

    def __init__(self, **changes: Change) -> None:
        self.changes: Mapping[str, Change] = changes

    def _changed(self, name: str, true: Any, asked: Asked) -> Any:
        return self.changes[name](true, asked) if name in self.changes else true

    def data_info(self, task: str) -> Any:
        """See `LoadsData.data_info`."""
        return self._changed("data_info", super().data_info(task), Asked(task))

    def data_digest(self, task: str) -> str:
        """See `LoadsData.data_digest`."""
        return str(self._changed("data_digest", super().data_digest(task), Asked(task)))

    def documents(self, task: str, split: Split) -> Any:
        """See `LoadsData.documents`."""
        return self._changed("documents", super().documents(task, split), Asked(task, split))

    def sample_contents(self, task: str, split: Split, ids: Sequence[int]) -> Any:
        """See `LoadsData.sample_contents`."""
        true = list(super().sample_contents(task, split, ids))
        return self._changed("sample_contents", true, Asked(task, split, ids))

    def labels(self, task: str, split: Split) -> Any:
        """See `LoadsData.labels`."""
        return self._changed("labels", list(super().labels(task, split)), Asked(task, split))

    def batch(self, task: str, split: Split, ids: Sequence[int]) -> Any:
        """See `LoadsData.batch`."""
        return self._changed("batch", super().batch(task, split, ids), Asked(task, split, ids))

    def epoch_order(self, task: str, **options: Any) -> Any:
        """See `LoadsData.epoch_order`."""
        return self._changed("epoch_order", super().epoch_order(task, **options), Asked(task))


def held(subject: Any) -> object:
    """Everything the protocol says of both tasks' data, with samples of both ends."""
    seen: list[object] = []
    for task in ("digits", "bytes"):
        info = subject.data_info(task)
        seen += [info, subject.data_digest(task)]
        seen += list(subject.epoch_order(task, seed=1, epoch=0))[:64]
        splits: tuple[tuple[Split, int], ...] = (
            ("train", info.train_size),
            ("validation", info.validation_size),
        )
        for split, size in splits:
            ids = [*range(min(size, 24)), *range(max(0, size - 8), size)]
            batch = subject.batch(task, split, ids)
            seen += [list(subject.documents(task, split)), batch.inputs, batch.targets]
            seen += list(subject.sample_contents(task, split, ids))
            seen += [torch.tensor(list(subject.labels(task, split)))]
    return seen


def _emptied(contents: list[bytes], asked: Asked) -> list[bytes]:
    return [b"" if index == 3 else c for index, c in zip(asked.ids, contents, strict=True)]


def _with_a_training_document(own: Sequence[bytes], asked: Asked) -> Sequence[bytes]:
    if asked.split == "train":
        return own
    return (*own, asked.sound.documents(asked.task, "train")[0])


def _with_a_training_line(own: Sequence[bytes], asked: Asked) -> Sequence[bytes]:
    if asked.split == "train" or asked.task == "digits":
        return own
    lines = asked.sound.documents(asked.task, "train")[5].splitlines()
    line = next(line for line in lines if len(line.strip()) >= 40)
    return (*own, b"import this\n" + line + b"\n")


def _one_held_out(contents: list[bytes], asked: Asked) -> list[bytes]:
    """One sample of the held-out split among those of training."""
    if asked.split == "validation":
        return contents
    held_out = asked.sound.sample_contents(asked.task, "validation", [0])[0]
    return [held_out if index == 7 else c for index, c in zip(asked.ids, contents, strict=True)]


def _past_the_end(batch: Batch, asked: Asked) -> Batch:
    """The last tenth of the training windows comes from the validation text."""
    info = asked.sound.data_info(asked.task)
    first = info.train_size * 9 // 10
    late = [row for row, index in enumerate(asked.ids) if index >= first]
    if asked.split == "train" and asked.task == "bytes" and late:
        held_out = [(asked.ids[row] - first) % info.validation_size for row in late]
        other = asked.sound.batch(asked.task, "validation", held_out)
        batch.inputs[late], batch.targets[late] = other.inputs, other.targets
    return batch


def _images_held_out(batch: Batch, asked: Asked) -> Batch:
    """Every fifth training image is one of the validation split, with the right label."""
    if asked.split == "train" and asked.task == "digits":
        labels = list(asked.sound.labels(asked.task, "validation"))
        for row, index in enumerate(asked.ids):
            if index % 5 == 0:
                alike = labels.index(int(batch.targets[row]))
                other = asked.sound.batch(asked.task, "validation", [alike])
                batch.inputs[row] = other.inputs[0]
    return batch


def inputs_of(change: Callable[[Any], Any], task: str, split: Split | None = None) -> Change:
    """Changes the inputs of one task's batches, of both splits or of one."""

    def changed(batch: Batch, asked: Asked) -> Batch:
        if asked.task != task or split not in (None, asked.split):
            return batch
        return replace(batch, inputs=change(batch.inputs))

    return changed


def _targets(change: Callable[[Any], Any], task: str) -> Change:
    """Changes the targets of one task's batches, by what is in the batch."""

    def changed(batch: Batch, asked: Asked) -> Batch:
        return replace(batch, targets=change(batch)) if asked.task == task else batch

    return changed


def _declares(task: str, **values: Any) -> Change:
    return lambda info, asked: replace(info, **values) if asked.task == task else info


def _padding_at_the_end(batch: Batch, asked: Asked) -> Batch:
    """One target in 65,075 samples is an id that is no byte."""
    info = asked.sound.data_info(asked.task)
    last = info.train_size - 1
    if asked.task == "bytes" and asked.split == "train" and last in asked.ids:
        batch.targets[list(asked.ids).index(last), -1] = info.cardinality
    return batch


def _not_a_number(batch: Batch, asked: Asked) -> Batch:
    if asked.task == "digits" and asked.split == "validation":
        batch.inputs[-1, 5] = float("nan")
    return batch


def _without_two_classes(labels: list[int], asked: Asked) -> list[int]:
    return [label for label in labels if label < 8] if asked.split == "validation" else labels


def _upper_case(documents: Sequence[bytes], asked: Asked) -> Sequence[bytes]:
    return tuple(d.upper() for d in documents) if asked.split == "validation" else documents


def _two_ahead(batch: Batch) -> Any:
    """The target of a place is that of the next; the last one's is kept."""
    return torch.cat([batch.targets[:, 1:], batch.targets[:, -1:]], dim=1)


def _few_labels_moved(batch: Batch) -> Any:
    """Every tenth label of a batch is that of the next row."""
    targets = batch.targets.clone()
    targets[::10] = batch.targets.roll(-1)[::10]
    return targets


_data = partial(Defect, stage=Stage.DATA, alive=held)
_intact = partial(_data, check="data.readable_and_intact")
_disjoint = partial(_data, check="data.splits_disjoint")
_range = partial(_data, check="data.label_or_token_range")
_balance = partial(_data, check="data.balance")

DEFECTS = (
    _intact(
        id="content_changed",
        title="The content loaded is not the one whose digest was recorded",
        shows="digits_digest is sha256:0000",
        subject=lambda: DataDefect(data_digest=lambda true, asked: "sha256:" + "0" * 64),
        subtlety=3,
    ),
    _intact(
        id="empty_sample",
        title="One sample of the training split is empty",
        shows="digits_train_unreadable is 1 samples",
        subject=lambda: DataDefect(sample_contents=_emptied),
        subtlety=3,
    ),
    _intact(
        id="last_sample_not_read",
        title="The reader stops one sample before the end of what it was asked for",
        shows="digits_train_unreadable is 1 samples",
        subject=lambda: DataDefect(sample_contents=lambda true, asked: true[:-1]),
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=4,
    ),
    _intact(
        id="nothing_held_out",
        title="The validation split is declared empty",
        shows="digits_validation_samples is 0 samples, under",
        subject=lambda: DataDefect(
            data_info=lambda true, asked: replace(true, validation_size=0),
        ),
        subtlety=2,
    ),
    _disjoint(
        id="D01_shared_document",
        title="One training document is in the validation split as well",
        shows="digits_shared_documents is 1 documents",
        subject=lambda: DataDefect(documents=_with_a_training_document),
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    _disjoint(
        id="D01_copied_passage",
        title="A validation document quotes one line of a training document",
        shows="bytes_shared_lines is 1 lines",
        subject=lambda: DataDefect(documents=_with_a_training_line),
        source="openai/parameter-golf#2127",
        subtlety=5,
    ),
    _disjoint(
        id="D01_split_after_shuffle",
        title="Documents are disjoint, but the loader's permutation indexes the whole set",
        shows="digits_shared_samples is 1 samples",
        subject=lambda: DataDefect(
            sample_contents=_one_held_out,
            data_info=lambda info, asked: replace(info, train_size=20),
            epoch_order=lambda order, asked: range(20),
        ),
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    _disjoint(
        id="D01_batches_read_validation",
        title="The last tenth of the training windows is read past the end of the training text",
        shows="bytes_shared_inputs is 256 rows",
        subject=lambda: DataDefect(batch=_past_the_end),
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    _disjoint(
        id="D01_batches_read_validation_images",
        title="Every fifth training image is one of the validation split, with the right label",
        shows="digits_shared_inputs is 10 rows",
        subject=lambda: DataDefect(batch=_images_held_out),
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    _range(
        id="labels_from_one",
        title="Labels count from one instead of from zero",
        shows="digits_train_out_of_range is",
        subject=lambda: DataDefect(labels=lambda true, asked: [label + 1 for label in true]),
        subtlety=2,
    ),
    _range(
        id="narrow_token_ids",
        title="Token ids are kept in int8: those above 127 become negative",
        shows="bytes_ids_lost_in_dtype is 128 ids",
        subject=lambda: DataDefect(
            data_info=_declares("bytes", input_dtype="int8"),
            batch=inputs_of(lambda x: x.to(torch.int8), "bytes"),
        ),
        subtlety=3,
    ),
    _range(
        id="images_as_int8",
        title="Images of [0, 1] are delivered as int8: all but the brightest pixels are 0",
        shows="digits_train_input_dtype is int8, expected float32",
        subject=lambda: DataDefect(batch=inputs_of(lambda x: x.to(torch.int8), "digits")),
        subtlety=2,
    ),
    _range(
        id="images_as_float64",
        title="Images are delivered in another precision than declared",
        shows="digits_train_input_dtype is float64",
        subject=lambda: DataDefect(batch=inputs_of(lambda x: x.to(torch.float64), "digits")),
        subtlety=3,
    ),
    _range(
        id="last_target_past_the_end",
        title="The last target of the last window is a padding id that is no token",
        shows="bytes_train_bad_targets is 1,",
        subject=lambda: DataDefect(batch=_padding_at_the_end),
        subtlety=5,
    ),
    _range(
        id="D05_labels_of_the_neighbour",
        title="Images and labels are sorted apart: each label is legal, and of another image",
        shows="digits_train_wrong_targets is",
        subject=lambda: DataDefect(batch=_targets(lambda batch: batch.targets.roll(1), "digits")),
        subtlety=3,
    ),
    _range(
        id="D05_one_label_in_ten",
        title="One label in ten is that of the next row",
        shows="digits_train_wrong_targets is",
        subject=lambda: DataDefect(batch=_targets(_few_labels_moved, "digits")),
        subtlety=4,
    ),
    _range(
        id="T14_targets_not_shifted",
        title="The target of a token is the token itself",
        shows="bytes_train_wrong_targets is",
        subject=lambda: DataDefect(batch=_targets(lambda batch: batch.inputs.clone(), "bytes")),
        source="huggingface/transformers#47394",
        subtlety=3,
    ),
    _range(
        id="T14_targets_two_ahead",
        title="The data set shifts targets that are shifted already: the token after the next",
        shows="bytes_train_wrong_targets is",
        subject=lambda: DataDefect(batch=_targets(_two_ahead, "bytes")),
        source="huggingface/transformers#37830",
        subtlety=3,
    ),
    _range(
        id="D12_missing_value_delivered",
        title="A missing pixel is delivered as NaN",
        shows="digits_validation_bad_inputs is 1,",
        subject=lambda: DataDefect(batch=_not_a_number),
        source="UKGovernmentBEIS/inspect_ai#4626",
        subtlety=3,
    ),
    _balance(
        id="two_classes_missing",
        title="Two classes are missing in the validation split",
        shows="digits_distribution_distance is",
        subject=lambda: DataDefect(labels=_without_two_classes),
        subtlety=3,
    ),
    _balance(
        id="text_of_another_kind",
        title="The validation text is of another kind than the training text: upper case",
        shows="bytes_distribution_distance is",
        subject=lambda: DataDefect(documents=_upper_case),
        subtlety=3,
    ),
)


class ManySmallClasses(ReferenceSubject):
    """200 classes and 400 held-out labels, split at random: far apart, by chance alone."""

    def tasks(self) -> Sequence[str]:
        """The task with classes."""
        return ("digits",)

    def labels(self, task: str, split: Split) -> Sequence[int]:
        """Labels drawn at random."""
        size = 1600 if split == "train" else 400
        generator = torch.Generator().manual_seed(size)
        return [int(label) for label in torch.randint(200, (size,), generator=generator)]


class DataOnly:
    """Loads one task's data, and neither names tasks nor trains."""

    name = "data only"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in methods_of("LoadsData"):
            raise AttributeError(name)
        true = getattr(ReferenceSubject(), name)
        return lambda task, *args, **kwargs: true("digits", *args, **kwargs)


READ = (
    "data.readable_and_intact",
    "data.splits_disjoint",
    "data.label_or_token_range",
    "data.balance",
)
"""Checks that read data and train nothing."""

BENIGN = (
    Benign(
        id="many_small_classes",
        title="Splits of many small classes, which differ by chance alone",
        subject=ManySmallClasses,
        checks=("data.balance",),
    ),
    Benign(
        id="half_precision_inputs",
        title="Images in bfloat16, as declared: a format that NumPy does not know",
        subject=lambda: DataDefect(
            data_info=_declares("digits", input_dtype="bfloat16"),
            batch=inputs_of(lambda x: x.bfloat16(), "digits"),
        ),
        checks=READ,
    ),
    Benign(
        id="data_only",
        title="Loads the data of one task, and neither names tasks nor trains",
        subject=DataOnly,
        checks=(*READ, "data.loader_order"),
    ),
)
