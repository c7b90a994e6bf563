"""Access to the data of the reference tasks, in the terms of the `LoadsData` protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from forge_harness.errors import UsageError
from forge_harness.protocols import Batch, DataInfo, LoadsData
from forge_harness.training.splits import (
    CONTEXT,
    IMAGE_BYTES,
    Split,
    SplitName,
    data_set,
    rows,
    windows,
)

if TYPE_CHECKING:
    from torch import Tensor

DataSource = LoadsData
"""Where a session gets its data: any object with the methods of `LoadsData`."""


def data_info(task: str) -> DataInfo:
    """Returns what is declared about the data (see `LoadsData.data_info`)."""
    data = data_set(task)
    return DataInfo(
        kind=data.kind,
        cardinality=data.cardinality,
        train_size=len(data.train),
        validation_size=len(data.validation),
        digest=data.recorded_digest,
        input_dtype="float32" if data.kind == "classes" else "int64",
    )


def data_digest(task: str) -> str:
    """Recomputes the digest from the content in memory (see `LoadsData.data_digest`)."""
    return data_set(task).digest()


def documents(task: str, split: SplitName) -> Sequence[bytes]:
    """Returns the images or files of a split (see `LoadsData.documents`)."""
    return data_set(task).split(split).documents


def sample_contents(task: str, split: SplitName, ids: Sequence[int]) -> Sequence[bytes]:
    """Returns the bytes of samples as `batch` delivers them (see `LoadsData.sample_contents`)."""
    inputs = batch(task, split, ids).inputs
    return contents_of(inputs)


def labels(task: str, split: SplitName) -> Sequence[int]:
    """Returns all class labels, or the token ids that occur (see `LoadsData.labels`)."""
    chosen = data_set(task).split(split)
    if chosen.classes is not None:
        return [int(label) for label in chosen.classes]
    return sorted({byte for document in chosen.documents for byte in set(document)})


def batch(task: str, split: SplitName, ids: Sequence[int]) -> Batch:
    """Returns the batch of these samples (see `LoadsData.batch`).

    Raises:
        UsageError: An id is not in the split.
    """
    chosen = data_set(task).split(split)
    size = len(chosen)
    outside = [index for index in ids if not 0 <= index < size]
    if outside:
        raise UsageError(
            f"Sample {outside[0]} is not in the {split} split of {task!r}, which has ids 0 to "
            f"{size - 1}."
        )
    inputs, targets = chosen.batch(torch.tensor(list(ids), dtype=torch.int64))
    return Batch(inputs=inputs, targets=targets)


def epoch_order(
    task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Sequence[int]:
    """Returns the train samples one rank visits in an epoch (see `LoadsData.epoch_order`).

    The permutation is a pure function of seed and epoch. Ranks take every `world_size`-th
    sample, as the micro-batches of one process do; nothing is padded or dropped.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} must be in 0 to world_size - 1 = {world_size - 1}.")
    size = len(data_set(task).train)
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return [int(index) for index in order[rank::world_size]]


def contents_of(inputs: Tensor) -> list[bytes]:
    """Returns the bytes of each sample: grey levels of images, characters of text."""
    values = inputs * 16 if inputs.is_floating_point() else inputs
    return [row.numpy().tobytes() for row in values.to(torch.uint8)]


class ReferenceData:
    """The module's functions as one object: the data source sessions use unless given another."""

    data_info = staticmethod(data_info)
    data_digest = staticmethod(data_digest)
    documents = staticmethod(documents)
    sample_contents = staticmethod(sample_contents)
    labels = staticmethod(labels)
    batch = staticmethod(batch)
    epoch_order = staticmethod(epoch_order)


class CanaryData:
    """A data source with documents added to its validation split, and nothing else changed.

    Token tasks get the windows of each canary as further samples; one shorter than a window is
    listed among the documents only. Class tasks get each canary of 64 bytes as one image of
    class 0. Digests are those of the data without canaries.
    """

    def __init__(self, source: DataSource, task: str, canaries: Sequence[bytes]) -> None:
        info = source.data_info(task)
        self._source = source
        self._canaries = tuple(canaries)
        self._base = info.validation_size
        self._extra = _canary_split(self._canaries, info.kind)

    def data_info(self, task: str) -> DataInfo:
        """See `LoadsData.data_info`."""
        return replace(self._source.data_info(task), validation_size=self._base + len(self._extra))

    def documents(self, task: str, split: SplitName) -> Sequence[bytes]:
        """See `LoadsData.documents`."""
        known = self._source.documents(task, split)
        return known if split == "train" else (*known, *self._canaries)

    def sample_contents(self, task: str, split: SplitName, ids: Sequence[int]) -> Sequence[bytes]:
        """See `LoadsData.sample_contents`."""
        return contents_of(self.batch(task, split, ids).inputs)

    def batch(self, task: str, split: SplitName, ids: Sequence[int]) -> Batch:
        """See `LoadsData.batch`; canaries have the ids after those of the source."""
        if split == "train" or all(index < self._base for index in ids):
            return self._source.batch(task, split, ids)
        parts = [self._one(task, index) for index in ids]
        return Batch(
            inputs=torch.cat([part.inputs for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
        )

    def data_digest(self, task: str) -> str:
        """See `LoadsData.data_digest`."""
        return self._source.data_digest(task)

    def labels(self, task: str, split: SplitName) -> Sequence[int]:
        """See `LoadsData.labels`."""
        return self._source.labels(task, split)

    def epoch_order(
        self, task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Sequence[int]:
        """See `LoadsData.epoch_order`."""
        return self._source.epoch_order(
            task, seed=seed, epoch=epoch, rank=rank, world_size=world_size
        )

    def _one(self, task: str, index: int) -> Batch:
        if index < self._base:
            return self._source.batch(task, "validation", [index])
        inputs, targets = self._extra.batch(torch.tensor([index - self._base]))
        return Batch(inputs=inputs, targets=targets)


def _canary_split(canaries: tuple[bytes, ...], kind: str) -> Split:
    if kind == "tokens":
        found = [window for canary in canaries for window in windows(canary)]
        return Split(canaries, rows(found, CONTEXT + 1), None)
    for canary in canaries:
        if len(canary) != IMAGE_BYTES:
            raise UsageError(
                f"A canary image has {len(canary)} bytes, {IMAGE_BYTES} were expected "
                "(8 x 8 grey levels); shorten or pad it."
            )
    classes = torch.zeros(len(canaries), dtype=torch.int64)
    return Split(canaries, rows(canaries, IMAGE_BYTES), classes)
