"""What packed weights buy: time and memory of a model, against its full-precision twin."""

import functools
import gc
import logging
from collections.abc import Mapping
from types import CodeType, FrameType, FunctionType, ModuleType

import numpy as np
import pytest
import torch

from forge_harness.benchmarks.timing import interleave, speedup
from forge_harness.evidence import largest

from .shapes import hold_shapes, logits_of

TOKENS = 128
SEED = 0


@pytest.mark.forge_timing
@pytest.mark.forge_check("performance.inference_speedup")
def test_inference_speedup(subject, policy, evidence):
    """Packed inference is faster than full precision, and says the same as the trained model.

    Both models answer in turns, in one thread, and batches that are drawn anew for each call, so
    that no answer that was kept counts; the ratio is the median over paired rounds with
    order-statistic bounds, and its lower bound is held against the limit. A model that
    is fast because it computes something else does not count: its logits must be those of the
    ternary model, to 1e-3 of their largest; and in every task, for batches from one row to 64 and
    for prefixes of sequences, to a step of an activation's code.
    """
    task = _largest(subject)
    batch = subject.example_batch(task, batch_size=4, seed=SEED)
    draw = _drawing(subject.example_batch(task, batch_size=64, seed=SEED + 1).inputs)
    packed = subject.inference_model(task, "packed", seed=SEED)
    full = subject.inference_model(task, "full", seed=SEED)
    trained = subject.build_model(task, seed=SEED).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            expected, found = logits_of(trained(batch.inputs)), packed(batch.inputs)
            _require_logits(expected, task)
            timed = interleave(
                {"packed": lambda: packed(draw()), "full": lambda: full(draw())},
                rounds=21,
            )
            again = packed(batch.inputs)
    finally:
        torch.set_num_threads(threads)
    evidence.at_most(
        "difference",
        largest(
            float((answer - expected).abs().max() / expected.abs().max())
            for answer in (found, again)
        ),
        limit=1e-3,
        reason="logits of the packed against those of the trained model, over the largest; first "
        "and last answer",
    )
    for each in subject.tasks():
        hold_shapes(evidence, subject, each, seed=SEED)
    interval = speedup(timed["packed"], timed["full"])
    if interval is None:
        pytest.skip("too few rounds: measure on a quieter machine")
    limit = policy.threshold("performance.inference_speedup.at_least")
    evidence.record(
        "estimate", interval.estimate, reason=f"{task}; {interval.low:.2f} to {interval.high:.2f}"
    )
    if interval.low < limit <= interval.high:
        pytest.skip(
            f"the limit of {limit:g} lies between the bounds {interval.low:.3f} and "
            f"{interval.high:.3f}: measure on a quieter machine"
        )
    evidence.at_least(
        "inference_speedup",
        interval.low,
        limit=limit,
        reason=f"lower bound of the median ratio, one thread; {interval.method}",
    )


def _require_logits(logits, task):
    """Logits of zeros are those of every model behind an output layer that begins at zero."""
    if not bool(logits.any()):
        pytest.skip(
            f"{task}: every logit of a fresh model is 0, as its output layer begins at zero; what "
            "the packed model computes does not show"
        )


def _drawing(inputs):
    """Returns a function that draws four rows of inputs."""
    generator = torch.Generator().manual_seed(SEED)
    return lambda: inputs[torch.randint(len(inputs), (4,), generator=generator)]


@pytest.mark.forge_check("performance.compression")
def test_compression(subject, policy, evidence):
    """The deployed model holds less memory than full precision by its stated ratio.

    Bytes of all tensors, arrays and byte strings that the modules hold after an answer, each memory
    once: parameters, buffers, and what can be reached from other attributes, from hooks and their
    closures, and from caches that `forward` names, as copies made at the first call. Embeddings and
    norms, which stay full precision, count on both sides. (Bytes on disk are
    `gates.compression_ratio`.)
    """
    task = _largest(subject)
    inputs = subject.example_batch(task, batch_size=1, seed=SEED).inputs
    sizes = {}
    for form in FORMS:
        model = subject.inference_model(task, form, seed=SEED)
        with torch.inference_mode():
            model(inputs)
        sizes[form] = _resident(model, subject)
        if form == "full":
            # One in float64 would flatter the ratio.
            evidence.at_most(
                "full_bytes_per_parameter",
                largest(p.element_size() for p in model.parameters()),
                limit=4,
                unit="B",
                reason="the widest parameter of the full-precision twin, as it would be deployed",
            )
        evidence.record(
            f"{form}_bytes", sizes[form], unit="B", reason="tensors of all modules, after an answer"
        )
    evidence.at_least(
        "resident_ratio",
        sizes["full"] / sizes["packed"],
        limit=policy.threshold("performance.resident_ratio.at_least"),
        reason=f"full precision over packed, {task}",
    )


FORMS = ("packed", "full")


def _resident(model, subject):
    """Bytes of what can be reached from a model, without what belongs to its subject."""
    memory, seen = {}, {id(subject)}
    held = [model]
    while held:
        value = held.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        held += _held_by(value)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, np.ndarray) and value.base is None:
            memory[value.ctypes.data] = value.nbytes
        elif isinstance(value, bytes | bytearray):
            memory[id(value)] = len(value)
    return sum(memory.values())


def _held_by(value):
    """Objects that one holds; of a function, what it was made with and the caches it names."""
    if isinstance(value, SHARED):
        return []
    if isinstance(value, FunctionType):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        made_with = (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
        return [*made_with, *(each for each in named if isinstance(each, CACHES))]
    forward = [type(value).forward] if isinstance(value, torch.nn.Module) else []
    base = [value.base] if isinstance(value, np.ndarray) else []
    return [*gc.get_referents(value), *forward, *base]


SHARED = (type, ModuleType, CodeType, FrameType, logging.Logger)
"""What a model does not hold for itself."""
CACHES = (torch.Tensor, np.ndarray, Mapping, list, functools._lru_cache_wrapper)


def _largest(subject):
    tasks = subject.tasks()
    return max(tasks, key=lambda task: subject.model_spec(task).parameters)
