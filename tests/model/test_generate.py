"""Generation: greedy and sampled, from models of which every logit is known."""

import numpy as np
import pytest
import torch

from forge_harness.model import ByteLM, ByteLMConfig, PackedLM, generate
from forge_harness.model.generate import Picker


class Table:
    """Logits (V,) of the next token depend on the last one alone; notes how it was called."""

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def prefill(self, tokens):
        self.calls.append(("prefill", tokens.tolist()))
        return self.logits[tokens]

    def decode(self, tokens):
        self.calls.append(("decode", tokens.tolist()))
        return self.logits[tokens]


def successor(vocabulary=6):
    """After n most likely comes n + 1."""
    return Table(torch.eye(vocabulary).roll(1, 1) * 5)


def test_greedy_takes_the_likeliest_and_calls_the_model_once_a_token():
    model = successor()
    assert list(generate(model, [4, 1], max_new_tokens=4)) == [2, 3, 4, 5]
    assert model.calls == [("prefill", [[4, 1]]), *[("decode", [[n]]) for n in (2, 3, 4)]]


def test_nothing_is_computed_before_it_is_asked_for():
    model = successor()
    text = generate(model, [0], max_new_tokens=3)
    assert model.calls == []
    assert next(text) == 1
    assert len(model.calls) == 1
    assert list(generate(model, [0], max_new_tokens=0)) == []
    assert len(model.calls) == 1


def test_a_stop_token_ends_the_text_and_is_not_yielded():
    assert list(generate(successor(), [0], max_new_tokens=9, stop=(4, 2))) == [1]
    assert list(generate(successor(), [3], max_new_tokens=2, stop=(3,))) == [4, 5]
    # Tensors of one token are not found among others by their hash.
    assert list(generate(successor(), [0], max_new_tokens=9, stop=torch.tensor([2]))) == [1]


@pytest.mark.parametrize("token", [300, -1])
def test_a_token_the_model_does_not_have_is_named(token):
    decoder = PackedLM(ByteLM(ByteLMConfig(width=32, heads=2, hidden=48, context=24)).eval())
    with pytest.raises(ValueError, match=f"Token {token} is none .* expected 0 to 255"):
        next(generate(decoder, [1, token], max_new_tokens=1))
    decoder.prefill(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=f"Token {token} is none"):
        decoder.decode_together([decoder], torch.tensor([token]))
    assert decoder.position == 1


def test_a_packed_model_continues_as_its_own_argmax():
    torch.manual_seed(0)
    model = ByteLM(ByteLMConfig(width=32, heads=2, hidden=48, context=24)).eval()
    decoder = PackedLM(model)
    found = list(generate(decoder, [1, 2, 3], max_new_tokens=8))
    with torch.no_grad():
        for n, token in enumerate(found):
            text = torch.tensor([[1, 2, 3, *found[:n]]])
            assert int(model(text)[0, -1].argmax()) == token


def test_samples_follow_the_softmax_of_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 99)):
        pick = Picker(temperature, top_k, seed=3)
        counts = np.bincount([pick(logits) for _ in range(4000)], minlength=4)
        wanted = np.exp(logits.numpy().astype(np.float64) / temperature)
        if top_k == 3:
            wanted[3] = 0
        wanted = 4000 * wanted / wanted.sum()
        assert counts[wanted == 0].sum() == 0
        kept = wanted > 0
        # Chi-square with at most 3 degrees of freedom: 16.3 has probability 0.001, the seed is set.
        assert ((counts[kept] - wanted[kept]) ** 2 / wanted[kept]).sum() < 16.3


def test_equal_seeds_give_equal_texts_and_leave_the_process_alone():
    model = Table(torch.zeros(6, 6))
    state = torch.get_rng_state()

    def text(seed):
        return list(generate(model, [0], max_new_tokens=20, temperature=1.0, seed=seed))

    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_candidate_or_hardly_any_temperature_is_greedy():
    logits = torch.tensor([0.0, 3.0, 2.999])
    assert {Picker(5.0, 1, seed)(logits) for seed in range(20)} == {1}
    assert {Picker(1e-300, None, seed)(logits) for seed in range(20)} == {1}


def test_forbidden_tokens_are_never_drawn_and_broken_logits_are_refused():
    minus = float("-inf")
    pick = Picker(1.0, None, 0)
    assert {pick(torch.tensor([0.0, minus, 0.0])) for _ in range(50)} == {0, 2}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected finite logits"):
            pick(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(ValueError, match="expected finite logits"):
        pick(torch.tensor([minus, minus]))


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"prompt": []}, ValueError, "The prompt is empty"),
        ({"prompt": [1, 2.5]}, TypeError, "prompt holds 2.5; expected token ids"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens -1; expected 0 or more"),
        ({"temperature": -0.1}, ValueError, "temperature -0.1; expected 0"),
        ({"temperature": float("nan")}, ValueError, "temperature nan; expected 0"),
        ({"temperature": float("inf")}, ValueError, "temperature inf; expected 0"),
        ({"top_k": 0}, ValueError, "top_k 0; expected at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k 1.5; expected an integer"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens 1.5; expected an integer"),
        ({"seed": 1.5}, TypeError, "seed 1.5; expected an integer"),
        ({"seed": 2**70}, ValueError, "seed 1180591620717411303424; expected -2"),
        ({"prompt": [2**70]}, ValueError, "prompt holds 1180591620717411303424; expected token"),
        ({"prompt": None}, TypeError, "prompt None; expected a sequence of token ids"),
        ({"max_new_tokens": "3"}, TypeError, "max_new_tokens '3'; expected an integer"),
        ({"top_k": "3"}, TypeError, "top_k '3'; expected an integer"),
        ({"temperature": "hot"}, TypeError, "temperature 'hot'; expected 0 for the likeliest"),
        ({"stop": "a"}, TypeError, "stop holds 'a'; expected token ids, which are integers"),
        ({"stop": None}, TypeError, "stop None; expected a sequence of token ids"),
    ],
)
def test_arguments_out_of_range_are_named_before_the_model_is_called(given, error, sentence):
    model = successor()
    with pytest.raises(error, match=sentence):
        generate(model, **{"prompt": [0], "max_new_tokens": 1, **given})
    assert model.calls == []


def test_numbers_of_other_libraries_are_token_ids():
    prompt = [np.int64(1), torch.tensor(2), True]
    assert list(generate(successor(), prompt, max_new_tokens=1)) == [2]
