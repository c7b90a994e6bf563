"""Tensors among what a model answers with."""

from dataclasses import dataclass

import pytest
import torch

from forge_harness.probes.outputs import tensors_of

LOSS, LOGITS = torch.tensor(1.0), torch.ones(2, 3)


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor
    kept: None = None


@pytest.mark.parametrize(
    "output",
    [(LOSS, LOGITS), [LOSS, None, LOGITS], {"loss": LOSS, "logits": LOGITS}, Answer(LOSS, LOGITS)],
    ids=lambda output: type(output).__name__,
)
def test_those_of_a_collection_come_in_its_order(output):
    assert [id(each) for each in tensors_of(output)] == [id(LOSS), id(LOGITS)]


def test_a_tensor_is_its_own_and_not_its_rows():
    assert [id(each) for each in tensors_of(LOGITS)] == [id(LOGITS)]


def test_an_output_without_tensors_has_none():
    assert tensors_of({"text": "hello"}) == []
