"""What the data checks share."""

from __future__ import annotations

from typing import Any


def tasks_of(subject: Any) -> list[str]:
    """Returns the subject's task names, or one placeholder when it names none."""
    return list(subject.tasks()) if hasattr(subject, "tasks") else ["default"]


def size_of(subject: Any, task: str, split: str) -> int:
    """Returns how many samples a split is declared to have."""
    info = subject.data_info(task)
    return int(info.train_size if split == "train" else info.validation_size)


def labels_of(subject: Any, task: str, split: str) -> list[Any]:
    """Returns the labels of a split as Python's own: tensors of one number are unequal keys."""
    listed = subject.labels(task, split)
    return list(listed.tolist() if hasattr(listed, "tolist") else map(_own, listed))


def order_of(subject: Any, task: str, **options: Any) -> list[int]:
    """Returns the ids of an epoch as Python's own, where a permutation of torch is given too."""
    return [int(index) for index in subject.epoch_order(task, **options)]


def _own(label: Any) -> Any:
    return label.tolist() if hasattr(label, "tolist") else label
