"""The calls that are timed: what they compute, and that they start afresh each time."""

import pytest
import torch

from forge_harness.model import ByteLM, ByteLMConfig, DenseLM, PackedLM
from forge_harness.model.throughput import CONTENDERS, contender, decode_step, prefill

CONTEXT = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ByteLM(ByteLMConfig(width=32, heads=2, hidden=48, context=CONTEXT)).eval()


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_what_their_names_say(model, name):
    made = contender(name, model)
    assert type(made) is (DenseLM if name.startswith("dense") else PackedLM)
    wanted = torch.bfloat16 if name.endswith("bf16") else torch.float32
    assert made.embedding.weight.dtype == wanted


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_calls_repeat_one_token_and_one_prompt(model, name, batch):
    made = contender(name, model)
    step, prompt = decode_step(made, fill=5, batch=batch), prefill(made, length=7, batch=batch)
    first = step().clone()
    logits = prompt().clone()
    assert first.shape == logits.shape == (batch, 1, 256)
    for _ in range(3):  # in turns: neither disturbs the other's cache
        assert torch.equal(step(), first)
        assert torch.equal(prompt(), logits)
    assert made.position == 0
    other = decode_step(made, fill=6, batch=batch)()
    assert not torch.equal(other, first)


def test_a_cache_may_be_empty_and_may_be_full(model):
    made = contender("packed", model)
    assert decode_step(made, fill=0)().shape == (1, 1, 256)
    assert decode_step(made, fill=CONTEXT - 1)().shape == (1, 1, 256)
    assert prefill(made, length=CONTEXT)().shape == (1, 1, 256)


def test_what_does_not_fit_is_refused(model):
    made = contender("packed", model)
    with pytest.raises(ValueError, match="contender 'int4'"):
        contender("int4", model)
    for fill in (-1, CONTEXT):
        with pytest.raises(ValueError, match=f"fill {fill}; expected 0 to {CONTEXT - 1}"):
            decode_step(made, fill=fill)
    for length in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"length {length}; expected 1 to the context"):
            prefill(made, length=length)
    with pytest.raises(TypeError, match=r"fill 1\.5; expected an integer"):
        decode_step(made, fill=1.5)
    with pytest.raises(TypeError, match=r"length 1\.5; expected an integer"):
        prefill(made, length=1.5)
