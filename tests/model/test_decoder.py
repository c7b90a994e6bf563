"""Texts that decode together, each in its own cache, get the bits they get alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.model import ByteLM, ByteLMConfig, PackedLM

TEXTS = 5


@pytest.fixture(scope="module", params=[False, True], ids=["default", "odd"])
def model(request):
    torch.manual_seed(7)
    config = ByteLMConfig(width=96, heads=3, hidden=100, layers=3, sub_norm=True, context=48)
    plain = ByteLMConfig(width=64, heads=2, hidden=160, context=48, fused_qkv=True)
    return PackedLM(ByteLM(config if request.param else plain).eval())


@settings(max_examples=15)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=TEXTS, max_size=TEXTS
    ),
    rounds=st.lists(
        st.dictionaries(st.integers(0, TEXTS - 1), st.integers(0, 255), min_size=1),
        min_size=1,
        max_size=12,
    ),
)
def test_together_is_alone_to_the_bit_whoever_takes_part(model, prompts, rounds):
    alone, together = ([model.fork() for _ in prompts] for _ in range(2))
    for texts in (alone, together):
        for text, prompt in zip(texts, prompts, strict=True):
            text.prefill(torch.tensor([prompt]))
    for tokens in rounds:
        logits = model.decode_together(
            [together[n] for n in tokens], torch.tensor(list(tokens.values()))
        )
        for row, (n, token) in zip(logits, tokens.items(), strict=True):
            assert torch.equal(row, alone[n].decode(torch.tensor([[token]]))[0, 0])
            assert together[n].position == alone[n].position


def test_what_cannot_decode_together_is_refused_and_changes_nothing(model):
    first, second, empty, full = (model.fork() for _ in range(4))
    for text in (first, second):
        text.prefill(torch.tensor([[1, 2]]))
    full.prefill(torch.zeros((1, 48), dtype=torch.int64))
    two = torch.tensor([3, 4])
    for texts, tokens, words in (
        ([], two[:0], "at least one"),
        ([first, first], two, "each once"),
        ([first, second], two[:1], "one a decoder"),
        ([first, empty], two, "holds no text"),
        ([first, full], two, "at most the context of 48"),
        ([first, copy.deepcopy(second)], two, "expected forks of this one"),
    ):
        with pytest.raises(ValueError, match=words):
            model.decode_together(texts, tokens)
    assert [text.position for text in (first, second, empty, full)] == [2, 2, 0, 48]
