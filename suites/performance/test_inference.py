"""What packed weights buy: time and memory of a model, against its full-precision twin."""

import pytest
import torch

from forge_harness.benchmarks.timing import in_one_thread, interleave, speedup
from forge_harness.evidence import largest

from .held import held_by, unseen
from .rounding import ALLOWED, roundings
from .shapes import SAME, hold_shapes, logits_of
from .tasks import largest_task

SEED = 0
MANY = 17
"""Rows that kernels for one row or for few do not take."""


@pytest.mark.forge_timing
@pytest.mark.forge_check("performance.inference_speedup")
def test_inference_speedup(subject, policy, evidence):
    """Packed inference is faster than full precision, and says the same as the trained model.

    Both models answer in turns, in one thread, and batches that are drawn anew for each call, so
    that no answer that was kept counts; the ratio is the median over paired rounds with
    order-statistic bounds, and its lower bound is held against the limit. Where a model uses
    threads of its own, their processor time counts together. A twin that answers as the ternary
    model does is none: not measured. A model that is fast because it computes something else does
    not count: its logits must be those of the ternary model, to 1e-3 of their largest; and in every
    task, for batches from one row to 64 and for prefixes of sequences, to a step of an activation's
    code. Where roundings of the inputs of ternary layers flip codes of activations and so move the
    trained model's own answers further, to twice as much.
    """
    task = largest_task(subject)
    batch = subject.example_batch(task, batch_size=4, seed=SEED)
    draw = _drawing(subject.example_batch(task, batch_size=64, seed=SEED + 1).inputs)
    packed = subject.inference_model(task, "packed", seed=SEED)
    full = subject.inference_model(task, "full", seed=SEED)
    trained = subject.build_model(task, seed=SEED).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            # A copy: some models answer in the same memory again.
            expected, found = logits_of(trained(batch.inputs)).clone(), packed(batch.inputs).clone()
            _require_logits(expected, task)
            with roundings(trained, subject.model_spec(task).quantized, seed=SEED):
                noise = _distance(logits_of(trained(batch.inputs)), expected)
            twin = logits_of(full(batch.inputs))
            timed = interleave(
                {"packed": lambda: packed(draw()), "full": lambda: full(draw())},
                rounds=21,
            )
            again = packed(batch.inputs)
    finally:
        torch.set_num_threads(threads)
    evidence.at_most(
        "difference",
        largest(_distance(answer, expected) for answer in (found, again)),
        limit=largest((SAME, ALLOWED * noise)),
        reason="logits of the packed against those of the trained model, over the largest; first "
        f"and last answer; roundings of its inputs move {noise:.2g}",
    )
    for each in subject.tasks():
        hold_shapes(evidence, subject, each, seed=SEED)
    _require_twin(subject, task, batch.inputs, twin=twin, ternary=expected)
    interval = speedup(in_one_thread(timed["packed"]), in_one_thread(timed["full"]))
    if interval is None:
        pytest.skip("too few rounds: measure on a quieter machine")
    _hold_speedup(evidence, policy, interval, task)


def _hold_speedup(evidence, policy, interval, task):
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


def _require_twin(subject, task, inputs, *, twin, ternary):
    """A twin that is the model in training is as slow as that one: no ratio to it says much.

    Where other weights of the ternary layers show in no logit (branches that begin at zero), a
    sound twin answers as the ternary model does.
    """
    if not _distance(twin, ternary) <= SAME:
        return
    other = subject.build_model(task, seed=SEED).eval()
    with torch.no_grad():
        for weight in subject.latent_weights(other).values():
            weight.copy_(weight.flip(0))
        moved = _distance(logits_of(other(inputs)), ternary)
    if not moved <= SAME:
        pytest.skip(
            f"{task}: the full-precision twin answers as the ternary model does; build it without "
            "quantization where the form is 'full'"
        )


def _distance(found, expected):
    """The largest difference of two models' logits, over the largest logit expected."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _drawing(inputs):
    """Returns a function that draws four rows of inputs."""
    generator = torch.Generator().manual_seed(SEED)
    return lambda: inputs[torch.randint(len(inputs), (4,), generator=generator)]


@pytest.mark.forge_check("performance.compression")
def test_compression(subject, policy, evidence):
    """The deployed model holds less memory than full precision by its stated ratio.

    Bytes of all tensors, arrays and byte strings that the modules hold after answers to one row and
    to several, or to one token and a whole text (kernels for many may unpack and keep what those
    for one do not), each memory once: parameters, buffers, and what can be reached from other
    attributes, from hooks and their closures, and from caches that `forward` names, as copies made
    at the first call. Embeddings and norms, which stay full precision, count on both sides. A model
    that holds less than the codes of its ternary layers can be told in has them where this does not
    look, as in memory of a library: not measured. (Bytes on disk are `gates.compression_ratio`.)
    """
    task = largest_task(subject)
    inputs = subject.example_batch(task, batch_size=MANY, seed=SEED).inputs
    # Few tokens in all: what a model keeps to work in grows with them, and is none of its weights.
    is_text = subject.model_spec(task).causal and inputs.dim() > 1
    asked = (inputs[:1], inputs[:1, :1] if is_text else inputs)
    found = {}
    for form in FORMS:
        model = subject.inference_model(task, form, seed=SEED)
        with torch.inference_mode():
            for given in asked:
                model(given)
        found[form] = held_by(model, subject)
        if form == "full":
            # One in float64 would flatter the ratio.
            evidence.at_most(
                "full_bytes_per_parameter",
                largest(value.element_size() for value in _stored(model)),
                limit=4,
                unit="B",
                reason="the widest parameter or stored buffer of decimals in the full-precision "
                "twin, as it would be deployed",
            )
        evidence.record(
            f"{form}_bytes",
            found[form].size,
            unit="B",
            reason="tensors of all modules, after answers",
        )
    limit = policy.threshold("performance.resident_ratio.at_least")
    if found["full"].size >= limit * found["packed"].size:
        problem = unseen(
            found["packed"], found["full"], subject.build_model(task, seed=SEED), subject
        )
        if problem:
            pytest.skip(f"{task}: {problem}")
    evidence.at_least(
        "resident_ratio",
        found["full"].size / found["packed"].size,
        limit=limit,
        reason=f"full precision over packed, {task}",
    )


def _stored(model):
    """Decimals of a model's state: a twin for inference may hold its weights in buffers."""
    values = model.state_dict().values()
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


FORMS = ("packed", "full")
