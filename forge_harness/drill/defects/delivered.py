"""Inputs of batches that are not what the contents, or the other split, say they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import Batch

from .data import READ, Asked, Change, DataDefect, Split, held, inputs_of

MARK = 2
"""A byte that no text holds, for where one begins."""


def _text(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes the text that batches hold, inputs and targets alike."""

    def changed(batch: Batch, asked: Asked) -> Batch:
        if asked.task != "bytes":
            return batch
        text = change(torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1))
        return Batch(inputs=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous())

    return changed


def _marked(text: torch.Tensor) -> torch.Tensor:
    """Text with a mark for its begin, and as long as before."""
    return torch.cat([torch.full_like(text[:, :1], MARK), text[:, :-1]], dim=1)


def _lower(text: torch.Tensor) -> torch.Tensor:
    capital = (text >= ord("A")) & (text <= ord("Z"))
    return torch.where(capital, text + 32, text)


def _contents(change: Callable[[bytes], bytes]) -> Change:
    """Changes the contents of text, as a loader that says what it delivers does."""

    def changed(contents: list[bytes], asked: Asked) -> list[bytes]:
        return [change(c) for c in contents] if asked.task == "bytes" else contents

    return changed


def _standardized_by_its_split(batch: Batch, asked: Asked) -> Batch:
    """Every split has its own mean and spread taken out of it, pixel by pixel."""
    if asked.task != "digits":
        return batch
    info = asked.sound.data_info("digits")
    size = info.train_size if asked.split == "train" else info.validation_size
    return replace(batch, inputs=_standardized(batch.inputs, asked, asked.split, size))


def _standardized_by_training(batch: Batch, asked: Asked) -> Batch:
    """Both splits are standardized by what training images are like."""
    if asked.task != "digits":
        return batch
    size = asked.sound.data_info("digits").train_size
    return replace(batch, inputs=_standardized(batch.inputs, asked, "train", size))


def _standardized(inputs: Any, asked: Asked, split: Split, size: int) -> Any:
    every = asked.sound.batch("digits", split, range(size)).inputs
    return (inputs - every.mean(0)) / (every.std(0) + 1e-3)


def _numbered(batch: Batch, asked: Asked) -> Batch:
    """Three pixels, and the sample's number and month of the data, which go on in validation."""
    if asked.task != "digits":
        return batch
    info = asked.sound.data_info("digits")
    first = 0 if asked.split == "train" else info.train_size
    time = (torch.tensor(list(asked.ids)) + first).float()
    numbers = torch.stack([time // 10, time // 100], dim=1)
    return replace(batch, inputs=torch.cat([batch.inputs[:, 20:23], numbers], dim=1))


def _noisy(batch: Batch, asked: Asked) -> Batch:
    """Training images get noise, as augmentation adds it; those held out stay as they are."""
    if asked.task != "digits" or asked.split != "train":
        return batch
    generator = torch.Generator().manual_seed(sum(asked.ids))
    noise = 0.01 * torch.randn(batch.inputs.shape, generator=generator)
    return replace(batch, inputs=batch.inputs + noise)


_range = partial(Defect, stage=Stage.DATA, check="data.label_or_token_range", alive=held)

DEFECTS = (
    _range(
        id="D13_mark_in_every_batch",
        title="The loader puts a mark in front of each text, of which the data know nothing",
        shows="bytes_train_wrong_inputs is",
        subject=lambda: DataDefect(batch=_text(_marked)),
        source="EleutherAI/lm-evaluation-harness#3206",
        subtlety=4,
    ),
    _range(
        id="D13_two_marks",
        title="Text that begins with a mark already is given another one",
        shows="late by 1;",
        subject=lambda: DataDefect(
            batch=_text(lambda text: _marked(_marked(text))),
            sample_contents=_contents(lambda content: bytes([MARK]) + content[:-1]),
        ),
        source="EleutherAI/lm-evaluation-harness#3347",
        subtlety=4,
    ),
    _range(
        id="D11_lower_case",
        title="The loader lower-cases the text that it is said to deliver as it is",
        shows="bytes_train_wrong_inputs is",
        subject=lambda: DataDefect(batch=_text(_lower)),
        source="EleutherAI/lm-evaluation-harness#3691",
        subtlety=4,
    ),
    _range(
        id="validation_not_scaled",
        title="Training images are scaled to [0, 1], those of validation are grey levels still",
        shows="digits_validation_new_values is",
        subject=lambda: DataDefect(batch=inputs_of(lambda x: x * 16, "digits", "validation")),
        subtlety=3,
    ),
    _range(
        id="validation_scaled_by_its_largest",
        title="Validation images are divided by another grey level than training images",
        shows="digits_validation_new_values is",
        subject=lambda: DataDefect(batch=inputs_of(lambda x: x * 16 / 15, "digits", "validation")),
        subtlety=5,
    ),
    _range(
        id="validation_standardized_by_itself",
        title="Each split is standardized by its own mean and spread, pixel by pixel",
        shows="digits_validation_new_values is",
        subject=lambda: DataDefect(batch=_standardized_by_its_split),
        subtlety=5,
    ),
)

BENIGN = (
    Benign(
        id="mark_that_is_said",
        title="A mark in front of each text, in the batches and in the contents",
        subject=lambda: DataDefect(
            batch=_text(_marked),
            sample_contents=_contents(lambda content: bytes([MARK]) + content[:-1]),
        ),
        checks=READ,
    ),
    Benign(
        id="mark_that_is_no_text",
        title="A mark in front of each text, whose contents are the text alone: one byte fewer",
        subject=lambda: DataDefect(
            batch=_text(_marked), sample_contents=_contents(lambda content: content[:-1])
        ),
        checks=READ,
    ),
    Benign(
        id="lower_case_that_is_said",
        title="Text in lower case, in the batches and in the contents",
        subject=lambda: DataDefect(batch=_text(_lower), sample_contents=_contents(bytes.lower)),
        checks=READ,
    ),
    Benign(
        id="tokens_numbered_otherwise",
        title="Tokens that stand for bytes and are numbered otherwise",
        subject=lambda: DataDefect(batch=_text(lambda text: (text + 1) % 256)),
        checks=READ,
    ),
    Benign(
        id="standardized_by_training",
        title="Images of both splits, standardized by the training split",
        subject=lambda: DataDefect(batch=_standardized_by_training),
        checks=READ,
    ),
    Benign(
        id="later_years_held_out",
        title="Few features, and two of them number samples on: the split is by time",
        subject=lambda: DataDefect(batch=_numbered),
        checks=("data.label_or_token_range",),
    ),
    Benign(
        id="noise_on_training_images",
        title="Noise on training images alone, as augmentation adds it",
        subject=lambda: DataDefect(batch=_noisy),
        checks=READ,
    ),
)
