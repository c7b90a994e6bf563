"""The two reference data sets, split by content and held in memory.

Tasks are `digits` and `bytes`. A variant may follow: `digits#2` holds fold 2 out instead of fold 0,
`bytes#small` has the same data as `bytes` and a model a quarter its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from forge_harness.errors import UsageError, unknown_choice
from forge_harness.training.corpus import standard_library_corpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

SplitName = Literal["train", "validation"]
TASKS = ("digits", "bytes")
DIGITS_FOLDS = 5
VARIANTS = {"digits": tuple(str(fold) for fold in range(DIGITS_FOLDS)), "bytes": ("small",)}
IMAGE_BYTES = 64
CONTEXT = 128
"""Bytes a sample of the byte corpus predicts."""
VALIDATION_WINDOWS = 256
"""32,768 predicted bytes, 2 s of CPU: the spread over seeds exceeds their sampling error."""

# Of the digits of scikit-learn 1.x (the UCI test set, 1,797 images), by fold.
_DIGITS_DIGESTS = (
    "sha256:77d0a92a2bf5456b5f98b3def6b14574451dc63a5f497b4e44de7d93f2a97a55",
    "sha256:fdf46b9aad12f3039f84755636be2ec5e9b64fde0598babd0ab538f2312fa8a5",
    "sha256:2246ccbf5d4e01847372fdbd6103a3f00eed1a76394644d1734cc6e523b7ee77",
    "sha256:95c10184cd1272943aae53952ccf2e16bac1ef87b518ea7adb8fac89cf6af453",
    "sha256:190ef3a0d6f6d698bcf0d0fcad1d5b7d74555a8cb8bb881744f20602ec752774",
)


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a data set.

    Attributes:
        documents: Content units: images of 64 bytes, or whole files.
        samples: uint8, first dimension the sample id: images (n, 64) with grey levels 0 to 16,
            or windows (n, CONTEXT + 1) of text.
        classes: int64 (n,), or None for text, whose targets are in the windows.
    """

    documents: tuple[bytes, ...]
    samples: Tensor
    classes: Tensor | None

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of samples.

        Images give fp32 (B, 64) in [0, 1] and int64 (B,); text gives int64 (B, CONTEXT) twice,
        the second one byte ahead.
        """
        chosen = self.samples[index]
        if self.classes is None:
            ids = chosen.to(torch.int64)
            return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        # A division by 16 is exact in fp32, so that the bytes can be recovered from the inputs.
        return chosen.to(torch.float32) / 16, self.classes[index]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Both splits, and the digest recorded for them."""

    kind: Literal["classes", "tokens"]
    cardinality: int
    train: Split
    validation: Split
    recorded_digest: str

    def split(self, name: SplitName) -> Split:
        """Returns the split of that name."""
        if name not in ("train", "validation"):
            raise UsageError(unknown_choice("split", name, ("train", "validation")))
        return self.train if name == "train" else self.validation

    def digest(self) -> str:
        """Recomputes `sha256:<hex>` over documents, samples and classes of both splits."""
        hasher = hashlib.sha256()
        for split in (self.train, self.validation):
            hasher.update(f"{len(split.documents)}:{tuple(split.samples.shape)};".encode())
            for document in split.documents:
                hasher.update(f"{len(document)};".encode())
                hasher.update(document)
            hasher.update(split.samples.numpy().data)
            if split.classes is not None:
                hasher.update(split.classes.numpy().data)
        return f"sha256:{hasher.hexdigest()}"


def split_task(task: str) -> tuple[str, str]:
    """Returns task and variant: `digits#3` -> (`digits`, `3`), `bytes` -> (`bytes`, "").

    Raises:
        UsageError: There is no such task or variant.
    """
    name, _, variant = task.partition("#")
    if name not in TASKS:
        raise UsageError(unknown_choice("task", name, TASKS))
    if variant and variant not in VARIANTS[name]:
        raise UsageError(unknown_choice(f"variant of {name}", variant, VARIANTS[name]))
    return name, variant


def base_task(task: str) -> str:
    """Returns the task without its variant.

    Raises:
        UsageError: There is no such task or variant.
    """
    return split_task(task)[0]


def data_set(task: str) -> DataSet:
    """Returns the data of a task, loaded on the first call.

    Raises:
        UsageError: There is no such task or variant.
        CorpusError: The interpreter ships without the sources the byte corpus is made of.
    """
    name, variant = split_task(task)
    return _digits(int(variant or 0)) if name == "digits" else _bytes()


def windows(content: bytes, context: int = CONTEXT) -> list[bytes]:
    """Cuts a document into windows of `context` + 1 bytes that predict every byte but the first.

    Consecutive windows share one byte; the last is aligned with the end, so that no byte is
    lost, and overlaps its neighbour. No window crosses a document.
    """
    last = len(content) - context - 1
    if last < 0:
        return []
    starts = list(range(0, last + 1, context))
    if starts[-1] != last:
        starts.append(last)
    return [content[start : start + context + 1] for start in starts]


def rows(contents: Sequence[bytes], width: int) -> Tensor:
    """Returns uint8 (n, width) of n contents of `width` bytes each."""
    array = np.frombuffer(bytearray(b"".join(contents)), dtype=np.uint8)
    return torch.from_numpy(array.reshape(len(contents), width))


@cache
def _digits(fold: int) -> DataSet:
    images, labels = _all_digits()
    held_out = _fold_of(images, labels) == fold
    return DataSet(
        kind="classes",
        cardinality=10,
        train=_image_split(images, labels, ~held_out),
        validation=_image_split(images, labels, held_out),
        recorded_digest=_DIGITS_DIGESTS[fold],
    )


@cache
def _all_digits() -> tuple[tuple[bytes, ...], NDArray[np.int64]]:
    """Images and labels in the order of their content hash, so that position says nothing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = [row.tobytes() for row in bunch.data.astype(np.uint8)]
    order = sorted(range(len(images)), key=lambda index: hashlib.sha256(images[index]).digest())
    labels = np.asarray(bunch.target, dtype=np.int64)
    return tuple(images[index] for index in order), labels[order]


def _fold_of(images: tuple[bytes, ...], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Deals the images of each class, ordered by content hash, to the folds in turn.

    Equal images share a fold: they are dealt once.
    """
    folds: dict[bytes, int] = {}
    dealt = dict.fromkeys(labels.tolist(), 0)
    for image, label in zip(images, labels.tolist(), strict=True):
        if image not in folds:
            folds[image] = dealt[label] % DIGITS_FOLDS
            dealt[label] += 1
    return np.array([folds[image] for image in images], dtype=np.int64)


def _image_split(
    images: tuple[bytes, ...], labels: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> Split:
    documents = tuple(image for image, keep in zip(images, chosen, strict=True) if keep)
    return Split(documents, rows(documents, IMAGE_BYTES), torch.from_numpy(labels[chosen]))


@cache
def _bytes() -> DataSet:
    corpus = standard_library_corpus()
    train = _text_split(corpus.train, None)
    validation = _text_split(corpus.validation, VALIDATION_WINDOWS)
    made = DataSet("tokens", 256, train, validation, recorded_digest="")
    return DataSet("tokens", 256, train, validation, recorded_digest=made.digest())


def _text_split(documents: tuple[bytes, ...], limit: int | None) -> Split:
    samples = [window for content in documents for window in windows(content)]
    if limit is not None and len(samples) > limit:
        # Evenly spaced, so that every held-out file counts by its size.
        samples = [samples[index * len(samples) // limit] for index in range(limit)]
    return Split(documents, rows(samples, CONTEXT + 1), None)
