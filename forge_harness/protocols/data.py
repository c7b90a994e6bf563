"""The data a subject trains and evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from .model import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """What the subject declares about a task's data."""

    kind: Literal["classes", "tokens", "values"]
    """What targets are: a class of the sample, tokens of a vocabulary, or numbers (regression)."""
    cardinality: int
    """Classes, or vocabulary size; 0 of numbers, which have no such count."""
    train_size: int
    validation_size: int
    digest: str
    """`sha256:<hex>` of the content, as recorded when the data were made."""
    input_dtype: str
    """torch dtype name of the inputs, for example "int64"."""
    ignored_target: int | None = None
    """The value in a batch's targets that is none (-100, padding): no loss, no answer counts it."""


@runtime_checkable
class LoadsData(Protocol):
    """The data of each task. A sample id is its index in its split."""

    def data_info(self, task: str) -> DataInfo:
        """What is declared about the data."""
        ...

    def data_digest(self, task: str) -> str:
        """`sha256:<hex>` recomputed now from the content that is loaded."""
        ...

    def documents(self, task: str, split: Literal["train", "validation"]) -> Sequence[bytes]:
        """The content units that must not be in two splits: images, or whole files."""
        ...

    def sample_contents(
        self, task: str, split: Literal["train", "validation"], ids: Sequence[int]
    ) -> Sequence[bytes]:
        """Content of samples exactly as the loader delivers them, labels left out.

        Where tokens are bytes, they are the bytes the content begins with: a mark that is put in
        front of each text, or lower case, is in the content too.
        """
        ...

    def labels(self, task: str, split: Literal["train", "validation"]) -> Sequence[Any]:
        """Class labels of a split, all token ids that occur in it, or its targets as numbers.

        Numbers are one a sample, or a row of them, as batches have them: scaled where these are.
        """
        ...

    def batch(self, task: str, split: Literal["train", "validation"], ids: Sequence[int]) -> Batch:
        """The batch of these samples, in this order; one may come twice.

        Of the train split it is what a session trains on, augmented at random where that is.
        """
        ...

    def epoch_order(
        self, task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Sequence[int]:
        """Train sample ids one rank visits in an epoch, in order."""
        ...
