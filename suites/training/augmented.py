"""Training samples that are drawn anew whenever they are read: augmented images, masked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

READ_AGAIN = 20
"""Times samples are read where a session was given others. As many as the data checks take."""
READ = 64
"""Samples read again at most: images that are decoded each time take a while."""
COMPARED, READS, VALUES = 32, 20, 4096
"""Samples of a step that are looked for among reads of each of them, and values of each."""


class GivenInputs:
    """What a model is called with, as it is called.

    Attributes:
        problem: Why the inputs of the last step are not known though no second read shows them.
        others: Whether the last step had inputs that no read of its samples gives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.problem = ""
        self.others = False
        self._calls: list[Tensor | None] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def close(self) -> None:
        """Takes the hook out."""
        self._handle.remove()

    def forget(self) -> None:
        """Begins a step."""
        self._calls.clear()

    @property
    def sizes(self) -> list[int]:
        """Samples of each call, in the order of the calls; empty where one shows none."""
        calls = [call for call in self._calls if call is not None]
        return [len(call) for call in calls] if len(calls) == len(self._calls) else []

    def drawn(self, subject: Any, task: str, ids: Sequence[int]) -> Tensor | None:
        """Returns the inputs of the step, where another read of its samples has others.

        None where samples read alike each time, or where `problem` says what is not known.
        """
        self.problem = ""
        self.others = False
        batch = subject.batch(task, "train", list(ids))
        given = self._together(batch.inputs)
        if given is not None and _same(given, batch.inputs):
            return None
        inputs, targets = drawn_anew(subject, task, ids)
        if not inputs:
            self.others = given is not None
            return None
        if targets or given is None:
            what = "targets" if targets else "inputs"
            self.problem = (
                f"training samples of {task} are drawn anew with each read (augmentation, "
                f"masking), and which {what} a step had does not show"
            )
            return None
        return given

    def _together(self, read: Tensor) -> Tensor | None:
        """The inputs of all calls as one batch, if it has the form of what is read."""
        calls = [call for call in self._calls if call is not None]
        if len(calls) != len(self._calls) or not calls:
            return None
        alike = all(c.shape[1:] == read.shape[1:] and c.dtype == read.dtype for c in calls)
        return torch.cat(calls) if alike and sum(map(len, calls)) == len(read) else None

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found = _first(args, kwargs)
        self._calls.append(None if found is None else found[1].detach().clone())


def recognised(subject: Any, task: str, ids: Sequence[int], given: Tensor) -> tuple[float, float]:
    """Returns the share of inputs that are like no other sample's more than their own's.

    Of those that a session was given, and of those of one more read: what augmentation leaves of
    a sample may be too little to tell.
    """
    places = [place for place, index in enumerate(ids) if index not in ids[:place]][:COMPARED]
    few = [ids[place] for place in places]
    first, *reads = (subject.batch(task, "train", few).inputs for _ in range(1 + READS))
    own = given[places].to(first.device)
    return _nearest(own, reads), _nearest(first, reads)


def _nearest(rows: Tensor, reads: Sequence[Tensor]) -> float:
    """The share of rows one of whose own reads is as near as any of another's."""
    # Tokens have no size: of those the number that differ.
    power = 2.0 if rows.is_floating_point() else 0.0
    step = -(-rows[0].numel() // VALUES)
    flat = [value.double().flatten(1)[:, ::step] for value in (rows, *reads)]
    distances = torch.stack([torch.cdist(flat[0], read, p=power) for read in flat[1:]]).amin(0)
    return float((distances.diagonal() <= distances.amin(1)).double().mean())


def put_in_place(model: nn.Module, inputs: Tensor) -> None:
    """Has every later call of a model get these inputs for its own."""

    def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        found = _first(args, kwargs)
        if found is None:
            return None
        own = inputs.to(found[1].device)
        changed = {**dict(enumerate(args)), **kwargs, found[0]: own}
        return tuple(changed[place] for place in range(len(args))), {k: changed[k] for k in kwargs}

    model.register_forward_pre_hook(put, with_kwargs=True)


def drawn_anew(subject: Any, task: str, ids: Sequence[int]) -> tuple[bool, bool]:
    """Returns whether inputs and targets of train samples are others when they are read again.

    Inputs alone are augmented, both masked or mixed. Targets alone are labels that were shuffled.
    """
    few = list(ids[:READ])
    first = subject.batch(task, "train", few)
    for _ in range(READ_AGAIN):
        again = subject.batch(task, "train", few)
        inputs = not _same(first.inputs, again.inputs)
        targets = not _same(first.targets, again.targets)
        if inputs or targets:
            return inputs, targets
    return False, False


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, wherever they are; what is not a number is itself."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _first(args: Any, kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """The first tensor of a call, and its place or name."""
    given = {**dict(enumerate(args)), **kwargs}
    return next(((k, v) for k, v in given.items() if isinstance(v, Tensor) and v.dim()), None)
