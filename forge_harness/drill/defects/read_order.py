"""Readers that hold only for samples in order, and splits made of windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import Batch

from .data import Asked, DataDefect, held


def _sorted_inputs(batch: Batch, asked: Asked) -> Batch:
    """Inputs by increasing index, as h5py wants them; targets as they were asked for."""
    sound = asked.sound.batch(asked.task, asked.split, sorted(asked.ids))
    return replace(batch, inputs=sound.inputs)


def _run_of(asked: Asked) -> list[int]:
    info = asked.sound.data_info(asked.task)
    size = info.train_size if asked.split == "train" else info.validation_size
    return [(asked.ids[0] + place) % size for place in range(len(asked.ids))]


def _run_from_the_first(batch: Batch, asked: Asked) -> Batch:
    return asked.sound.batch(asked.task, asked.split, _run_of(asked))


def _contents_without_repetition(contents: list[bytes], asked: Asked) -> Sequence[bytes]:
    """Sorted and each once, as a set of rows is read from a data base."""
    ids = sorted(set(asked.ids))
    return [contents[list(asked.ids).index(index)] for index in ids]


def _half_a_window_on(batch: Batch, asked: Asked) -> Batch:
    """Held-out windows begin in the middle of those of training."""
    if asked.task != "bytes" or asked.split == "train":
        return batch
    ids = [200 * index for index in asked.ids]
    own, after = (asked.sound.batch("bytes", "train", [i + k for i in ids]) for k in (0, 1))
    return Batch(
        inputs=_spliced(own.inputs, after.inputs), targets=_spliced(own.targets, after.targets)
    )


def _spliced(first: Tensor, second: Tensor) -> Tensor:
    middle = first.shape[1] // 2
    return torch.cat([first[:, middle:], second[:, :middle]], dim=1)


def _noisy(batch: Batch, asked: Asked) -> Batch:
    """Noise by the place in the batch, another for each call of another size or order."""
    if asked.task != "digits" or asked.split != "train":
        return batch
    generator = torch.Generator().manual_seed(len(asked.ids))
    return replace(batch, inputs=batch.inputs + torch.rand(batch.inputs.shape, generator=generator))


def in_any_order(subject: Any) -> object:
    """Batches and contents of a few samples out of order, some of them twice."""
    ids = [7, 3, 11, 3, 0]
    return [
        [subject.batch(task, split, ids), list(subject.sample_contents(task, split, ids))]
        for task in ("digits", "bytes")
        for split in ("train", "validation")
    ]


_ORDER = partial(
    Defect, stage=Stage.DATA, check="data.readable_and_intact", alive=in_any_order, subtlety=4
)

DEFECTS = (
    _ORDER(
        id="D05_inputs_in_sorted_order",
        title="Inputs are read by increasing index, labels in the order asked for",
        shows="digits_train_misplaced_inputs is",
        subject=lambda: DataDefect(batch=_sorted_inputs),
    ),
    _ORDER(
        id="D05_run_from_the_first",
        title="A batch is the run of samples from the first index on",
        shows="digits_train_misplaced_inputs is",
        subject=lambda: DataDefect(batch=_run_from_the_first),
    ),
    _ORDER(
        id="D05_contents_without_repetition",
        title="Contents come sorted and each once, whatever list was asked for",
        shows="digits_train_misplaced_contents is",
        subject=lambda: DataDefect(sample_contents=_contents_without_repetition),
    ),
    Defect(
        id="D01_windows_overlap_the_split",
        title="Held-out windows of text overlap those of training by half",
        stage=Stage.DATA,
        check="data.splits_disjoint",
        shows="bytes_known_samples is 0.9",
        subject=lambda: DataDefect(batch=_half_a_window_on),
        alive=held,
        subtlety=5,
    ),
)

BENIGN = (
    Benign(
        id="noise_by_place",
        title="Training images with noise that depends on their place in the batch",
        subject=lambda: DataDefect(batch=_noisy),
        checks=("data.readable_and_intact",),
    ),
)
