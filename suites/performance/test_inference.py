"""What packed weights buy: time and memory of a model, against its full-precision twin."""

from collections.abc import Mapping
from types import FunctionType, ModuleType

import pytest
import torch

from forge_harness.benchmarks.timing import interleave, speedup

TOKENS = 128
SEED = 0


@pytest.mark.forge_timing
@pytest.mark.forge_check("performance.inference_speedup")
def test_inference_speedup(subject, policy, evidence):
    """Packed inference is faster than full precision, and says the same as the trained model.

    Both models answer the same batch in turns, in one thread; the ratio is the median over paired
    rounds with order-statistic bounds, and its lower bound is held against the limit. A model that
    is fast because it computes something else does not count: its logits must be those of the
    ternary model, to 1e-3 of their largest.
    """
    task = _largest(subject)
    batch = subject.example_batch(task, batch_size=4, seed=SEED)
    packed = subject.inference_model(task, "packed", seed=SEED)
    full = subject.inference_model(task, "full", seed=SEED)
    trained = subject.build_model(task, seed=SEED).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            expected, found = trained(batch.inputs), packed(batch.inputs)
            timed = interleave(
                {"packed": lambda: packed(batch.inputs), "full": lambda: full(batch.inputs)},
                rounds=21,
            )
            again = packed(batch.inputs)
    finally:
        torch.set_num_threads(threads)
    evidence.at_most(
        "difference",
        max(
            float((answer - expected).abs().max() / expected.abs().max())
            for answer in (found, again)
        ),
        limit=1e-3,
        reason="logits of the packed against those of the trained model, over the largest; first "
        "and last answer",
    )
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


@pytest.mark.forge_check("performance.compression")
def test_compression(subject, policy, evidence):
    """The deployed model holds less memory than full precision by its stated ratio.

    Bytes of all tensors that the modules hold after an answer, each storage once: parameters,
    buffers, and what lies in other attributes, as copies made at the first call do. Embeddings and
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
        sizes[form] = _resident(model)
        if form == "full":
            # One in float64 would flatter the ratio.
            evidence.at_most(
                "full_bytes_per_parameter",
                max(p.element_size() for p in model.parameters()),
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


def _resident(model):
    """Bytes of the tensors in the modules' attributes, in containers and plain objects too."""
    storages, seen = {}, set()
    # A module's parameters, buffers and submodules are dictionaries among its attributes.
    held = [model]
    while held:
        value = held.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, list | tuple | set):
            held += value
        elif not isinstance(value, type | ModuleType | FunctionType):
            held += getattr(value, "__dict__", {}).values()
    return sum(storages.values())


def _largest(subject):
    tasks = subject.tasks()
    return max(tasks, key=lambda task: subject.model_spec(task).parameters)
