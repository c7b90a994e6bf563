"""What proves that a seeded defect is alive: exact, deterministic, and blind to nothing it sees."""

from dataclasses import dataclass
from enum import Enum
from functools import partial

import pytest
import torch

from forge_harness.drill import observe
from forge_harness.drill.observe import fingerprint
from forge_harness.subject.reference import ReferenceSubject

OBSERVABLES = (
    observe.weight_codes,
    observe.activation_codes,
    observe.linear,
    observe.integer_products,
    observe.packed,
    observe.built,
    observe.gradients,
    observe.trained,
    partial(observe.trained, task="bytes", accumulation=2),
    observe.resumed,
    observe.exported,
    observe.data,
)


@dataclass
class Pair:
    left: object
    right: object


class Word(Enum):
    ONE = 1


def digest(value):
    return fingerprint(lambda subject: value, None)


SAME = [
    (torch.arange(6).reshape(2, 3).t(), torch.arange(6).reshape(2, 3).t().contiguous()),
    ({"a": 1.5}, {"a": 1.5}),
    ({3, 1, 2}, {2, 3, 1}),
    (float("nan"), float("nan")),
    (Pair(1, "x"), Pair(1, "x")),
    (torch.zeros(0), torch.zeros(0)),
]
DIFFERENT = [
    (torch.zeros(3), torch.zeros(3).neg()),
    (torch.zeros(4), torch.zeros(2, 2)),
    (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
    (torch.ones(2), torch.ones(2).nextafter(torch.tensor(2.0))),
    (1, 1.0),
    (1, True),
    (1, "1"),
    (None, 0),
    (0.1, 0.1 + 2e-17),
    ([1, [2]], [[1], 2]),
    ([1, 2], [2, 1]),
    ([], [[]]),
    ({"a": 1}, {"b": 1}),
    (b"ab", b"ac"),
    (Pair(1, 2), Pair(2, 1)),
    (Word.ONE, 1),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=range(len(SAME)))
def test_equal_values_have_one_fingerprint(one, other):
    assert digest(one) == digest(other)
    assert digest(one).startswith("sha256:")


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_values_have_two(one, other):
    assert digest(one) != digest(other)


def test_files_count_with_their_bytes(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    before = digest(file)
    file.write_bytes(b"two")
    assert digest(file) != before


def test_raising_is_something_a_subject_does():
    def raising(subject):
        raise KeyError("norm.weight")

    assert fingerprint(raising, None) == "raised KeyError"


def test_what_cannot_be_compared_is_said():
    assert digest(object()) == "raised TypeError"


@pytest.mark.parametrize("observable", OBSERVABLES, ids=lambda o: getattr(o, "__name__", "bytes"))
def test_the_reference_does_the_same_each_time(observable):
    first = fingerprint(observable, ReferenceSubject())
    assert first.startswith("sha256:")
    assert fingerprint(observable, ReferenceSubject()) == first
