"""Tokens a second of a language model: packed against dense, all through the same decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forge_harness.model import ByteLM, ByteLMConfig
from forge_harness.model.decoder import CachedDecoder
from forge_harness.model.throughput import CONTENDERS, Contender, contender, decode_step, prefill

from .timing import Call, disturbed_of, interleave, samples_of, speedup, void_of

BASELINE: Contender = "dense-bf16"


@dataclass(frozen=True, slots=True)
class Phase:
    """One of the two things a model does.

    Attributes:
        name: "decode" (one token at a time, behind a prompt) or "prefill" (the prompt at once).
        threads: Of torch and of the kernels.
        tokens_per_second: Contender -> median.
        over_bf16: Packed contender -> (estimate, low, high) of times faster than dense bf16.
        samples: Contender -> seconds a call, one entry a round.
        disturbed: Contender -> whether another process took the core, one entry a round.
        void: Candidates and ratios of which too few rounds were undisturbed; see `timing.void_of`.
    """

    name: str
    threads: int
    tokens_per_second: dict[str, float]
    over_bf16: dict[str, tuple[float, float, float]]
    samples: dict[str, list[float]] = field(repr=False, default_factory=dict)
    disturbed: dict[str, list[bool]] = field(repr=False, default_factory=dict)
    void: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` found.

    Attributes:
        parameters: Of the dense model.
        difference: Largest difference of the packed model's logits from the trained model's, over
            the largest logit; both fp32.
        same_tokens: Share of positions whose most likely token is the same.
        phases: Decode and prefill, for each number of threads.
    """

    parameters: int
    difference: float
    same_tokens: float
    phases: list[Phase]


def measure(
    *,
    width: int = 1024,
    layers: int = 8,
    prompt: int = 128,
    threads: tuple[int, ...] = (1, 2),
    rounds: int = 11,
    so_far: Callable[[Measured], object] = lambda found: None,
) -> Measured:
    """Times decode and prefill of the byte language model at a size, weights drawn, batch 1.

    Args:
        width: D; the feed-forward is 3 D wide, a head has 64 entries.
        layers: Blocks.
        prompt: Tokens of the prompt, and of the cache when decoding.
        threads: Numbers of threads to time with.
        rounds: Batches of each contender, which take turns.
        so_far: Told what was found after each phase.

    Raises:
        ValueError: The sizes make no model.
    """
    torch.manual_seed(0)
    config = ByteLMConfig(
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        hidden=3 * width,
        context=prompt + 1,
    )
    model = ByteLM(config).eval()
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            sides = {name: contender(name, model) for name in CONTENDERS}
            tokens = torch.randint(256, (1, prompt), generator=torch.Generator().manual_seed(1))
            expected, found = model(tokens), sides["packed"].prefill(tokens)
            sides["packed"].reset()
            measured = _compared(model, expected, found)
            for count in threads:
                torch.set_num_threads(count)
                for phase in ("decode", "prefill"):
                    measured.phases.append(_phase(phase, sides, count, prompt, rounds))
                    so_far(measured)
    finally:
        torch.set_num_threads(before)
    return measured


def _compared(model: ByteLM, expected: Tensor, found: Tensor) -> Measured:
    """Returns what is known before anything is timed."""
    same = expected.argmax(-1) == found.argmax(-1)
    return Measured(
        parameters=sum(p.numel() for p in model.parameters()),
        difference=float((found - expected).abs().max() / expected.abs().max()),
        same_tokens=float(same.float().mean()),
        phases=[],
    )


def _phase(
    name: str, sides: Mapping[Contender, CachedDecoder], threads: int, prompt: int, rounds: int
) -> Phase:
    make = decode_step if name == "decode" else prefill
    size = {"fill": prompt} if name == "decode" else {"length": prompt}
    calls: dict[str, Call] = {side: make(model, **size) for side, model in sides.items()}
    timed = interleave(calls, rounds=rounds, batch=0.05)
    tokens = 1 if name == "decode" else prompt
    over = {}
    for side in ("packed", "packed-bf16"):
        if found := speedup(timed[side], timed[BASELINE]):
            over[side] = (found.estimate, found.low, found.high)
    return Phase(
        name=name,
        threads=threads,
        tokens_per_second={side: tokens / t.median for side, t in timed.items()},
        over_bf16=over,
        samples=samples_of(timed),
        disturbed=disturbed_of(timed),
        void=void_of(timed, [(BASELINE, side) for side in over]),
    )
