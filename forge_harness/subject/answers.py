"""Requests with the answers of a trained model: whole forwards, no cache, no batch, no packing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.durable import write_durably

Line = dict[str, Any]

REQUESTS, NEW_TOKENS = 24, 12
SAMPLED, SAMPLED_TOKENS, TEMPERATURE = 6, 8, 0.3
LONG_PROMPT = 116
"""Tokens of a prompt that is continued to the end of the context."""
LIKELIEST, HALF = 6, (80, 97)
"""Long prompts continued by their likeliest tokens, and how many tokens they have."""
ROWS = 24
CLEAR = 0.1
"""Least lead of the likeliest token. A cache changes the order of additions, which moves logits by
1e-6, and at one position in a hundred the code of an activation, which moves leads by up to 0.03
(4,800 positions of the byte model)."""
WOBBLE, SHAKES = 0.03, 3
"""Standard deviation of logits: a draw that such a change moves, in one of so many, is not asked
for. At a higher temperature nearly all draws are moved, as unlikely tokens lie close together."""


def write_requests(path: Path, lines: Iterable[Line]) -> Path:
    """Writes a request file; returns its path."""
    write_durably(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return path


def greedy(model: nn.Module) -> list[Line]:
    """Short prompts continued by their likeliest tokens: cheap enough to be sent as load."""
    random = Random(11)
    lines: list[Line] = []
    while len(lines) < REQUESTS:
        prompt = _prompt(random, random.randrange(8, 25))
        tokens = _likeliest(model, prompt, NEW_TOKENS)
        if tokens is not None:
            lines.append(_line(prompt, tokens))
    return lines


def special(model: nn.Module, context: int) -> list[Line]:
    """Sampled ones, each prompt under two seeds, and long ones, to the end of the context."""
    random = Random(12)
    lines: list[Line] = []
    while len(lines) < SAMPLED + 2:
        is_long = len(lines) == SAMPLED
        prompt = _prompt(random, LONG_PROMPT if is_long else random.randrange(8, 25))
        count = context + 1 - LONG_PROMPT if is_long else SAMPLED_TOKENS
        seed = random.randrange(1 << 31)
        drawn = [_drawn(model, prompt, count, each) for each in (seed, seed + 1)]
        # What the likeliest tokens or another seed give too would show neither.
        if drawn[0] != drawn[1] and None not in drawn:
            sampling = {"temperature": TEMPERATURE}
            lines += [
                _line(prompt, tokens, seed=seed + n, **sampling)
                for n, tokens in enumerate(drawn)
                if tokens is not None
            ]
    while len(lines) < SAMPLED + 2 + LIKELIEST:
        prompt = _prompt(random, random.randrange(*HALF))
        count = context + 1 - len(prompt)
        tokens = _likeliest(model, prompt, count)
        # An answer that is the same to the prompt's halves in the other order may tell nothing of
        # places: rotary positions that stood still gave the same six.
        if tokens is not None and _likeliest(model, _halves_swapped(prompt), count) != tokens:
            lines.append(_line(prompt, tokens))
    return lines


def labelled(model: nn.Module, inputs: Tensor) -> list[Line]:
    """One to three rows a request, of whatever classes."""
    random = Random(13)
    lines: list[Line] = []
    while len(lines) < ROWS:
        rows = inputs[[random.randrange(len(inputs)) for _ in range(random.randrange(1, 4))]]
        with torch.inference_mode():
            first, second = model(rows).topk(2).values.unbind(-1)
            labels = model(rows).argmax(-1).tolist()
        if bool((first - second > CLEAR).all()):
            body = {"inputs": rows.tolist()}
            lines.append({"path": "/v1/predict", "body": body, "expect": {"labels": labels}})
    return lines


def _prompt(random: Random, length: int) -> list[int]:
    return [random.randrange(256) for _ in range(length)]


def _halves_swapped(prompt: Sequence[int]) -> list[int]:
    half = len(prompt) // 2
    return [*prompt[half:-1], *prompt[:half], prompt[-1]]


def _line(prompt: Sequence[int], tokens: Sequence[int], **sampling: float) -> Line:
    body = {"prompt": list(prompt), "max_tokens": len(tokens), **sampling}
    text = bytes(tokens).decode("utf-8", "replace")
    text_sha256 = hashlib.sha256(text.encode()).hexdigest()
    expect: Line = {"tokens": list(tokens), "text_sha256": text_sha256}
    return {"path": "/v1/completions", "body": body, "expect": expect}


@torch.inference_mode()
def _likeliest(model: nn.Module, prompt: Sequence[int], count: int) -> list[int] | None:
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1]
        first, second = logits.topk(2).values
        if first - second < CLEAR:
            return None
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def _drawn(model: nn.Module, prompt: Sequence[int], count: int, seed: int) -> list[int] | None:
    """Tokens drawn in float64 from the softmax, likeliest first, by a generator of the seed."""
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1].double()
        state = generator.get_state()
        changes = torch.randn((SHAKES, *logits.shape), generator=noise, dtype=torch.float64)
        found = []
        for each in (*(logits + WOBBLE * changes), logits):
            generator.set_state(state)
            chances, order = (each / TEMPERATURE).softmax(0).sort(descending=True)
            found.append(int(order[torch.multinomial(chances, 1, generator=generator)]))
        if len(set(found)) > 1:
            return None
        tokens.append(found[-1])
    return tokens[len(prompt) :]
