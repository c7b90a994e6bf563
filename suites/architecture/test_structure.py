"""What surrounds the quantized layers: the causal mask, the state dict."""

import pytest
import torch

from forge_harness.evidence import largest, smallest
from forge_harness.protocols import Batch, LoadsData

from .calls import loss_of, observe
from .support import RESPONSE, Count, Worst, built, expect_none

MOST_CUTS = 256
"""Positions tried at most; longer inputs get as many, evenly spread."""


@pytest.mark.forge_check("architecture.causal_mask")
def test_causal_mask(subject, evidence):
    """A later token never moves an earlier output.

    Metamorphic: exchange all tokens after a position, for every position of an example batch, in
    both modes, and of a training sample at its full length, where the subject loads data: kernels
    take other paths at the ends of their blocks and beyond some length. Outputs up to the position
    stay (1e-6 of the largest output: masked terms are exact zeros, so they are equal bit for bit
    unless the kernel reorders sums), outputs after it respond. An activation scale taken over the
    sequence shows too.
    """
    causal = [task for task in subject.tasks() if subject.model_spec(task).causal]
    if not causal:
        pytest.skip("no model is declared causal")
    for task in causal:
        part = built(subject, task)
        leak, least = Worst(), float("inf")
        for inputs, mode in _sequences(subject, part):
            part.model.train(mode)
            least = smallest((least, _influence(subject, part, inputs, leak)))
        evidence.at_most(
            f"{task}.leak",
            leak.value,
            limit=1e-6,
            reason=leak.text("relative change of outputs before the first changed token"),
        )
        evidence.at_least(
            f"{task}.response",
            least,
            limit=RESPONSE,
            reason="relative change of outputs after it; otherwise nothing was tested",
        )


def _sequences(subject, part):
    """Yields batches and the training mode to try them in."""
    yield part.batch, True
    yield part.batch, False
    if isinstance(subject, LoadsData):
        yield subject.batch(part.task, "train", [0]), False


def _influence(subject, part, batch, leak):
    """Notes the largest change before each cut in `leak`; returns the least response after one."""
    inputs = batch.inputs
    before = observe(subject, part.model, batch)
    scale = float(before.abs().max())
    others = _exchanged(inputs)
    found = [[] for _ in _by_token(before, inputs)]
    for cut in _cuts(inputs.shape[1]):
        changed = torch.cat([inputs[:, : cut + 1], others[:, cut + 1 :]], dim=1)
        after = observe(subject, part.model, Batch(inputs=changed, targets=batch.targets))
        for moved, sizes in zip(_by_token(after - before, inputs), found, strict=True):
            size = moved.abs() / scale
            kept, later = size[:, : cut + 1], size[:, cut + 1 :]
            sizes.append((cut, float(kept.max()), float(later.max())))
    # As many logits as tokens: read along the logits, every sound model leaks.
    leaks = [largest(kept for _, kept, _ in sizes) for sizes in found]
    least = smallest(leaks)
    read = next((s for s, value in zip(found, leaks, strict=True) if value == least), found[0])
    for cut, kept, _ in read:
        leak.see(f"{inputs.shape[1]} tokens, after position {cut}", kept)
    return smallest(later for _, _, later in read)


def _by_token(output, inputs):
    """Outputs as (batch, tokens, ...): tokens may come last, or together with their sample.

    Several, where more than one dimension is as long as there are tokens.
    """
    batch, tokens = inputs.shape[:2]
    if output.shape[0] == batch and tokens in output.shape[1:]:
        places = [place for place, size in enumerate(output.shape) if place and size == tokens]
        return [output.movedim(place, 1) for place in places]
    if output.shape[0] == batch * tokens:
        return [output.reshape(batch, tokens, -1)]
    pytest.skip(
        f"which outputs are those of which token does not show: {tuple(output.shape)} of inputs "
        f"{tuple(inputs.shape)}; return one row a token, (batch, tokens, ...)"
    )


def _exchanged(inputs):
    """Every value replaced by another one of those that occur: valid, and nowhere the same."""
    alphabet, places = torch.unique(inputs, return_inverse=True)
    return alphabet[(places + len(alphabet) // 2) % len(alphabet)]


def _cuts(length):
    """Positions with something after them: all, or `MOST_CUTS` spread over the length."""
    last = length - 2
    if last < MOST_CUTS:
        return range(last + 1)
    return [round(step * last / (MOST_CUTS - 1)) for step in range(MOST_CUTS)]


@pytest.mark.forge_check("architecture.state_dict_round_trip")
def test_state_dict_round_trip(subject, evidence, tmp_path):
    """A model loaded from a saved state dict is the same model; tied weights stay tied.

    Oracle: bitwise equality of every tensor and of the loss in both modes, after a trip through a
    file into a model built from another seed; each latent weight in turn, left out, is missed.
    """
    for task in subject.tasks():
        part = built(subject, task)
        torch.save(part.model.state_dict(), tmp_path / "state.pt")
        # Written here, a moment ago: tensors may be of a library's own type (torchao's are).
        state = torch.load(tmp_path / "state.pt", weights_only=False)
        other = subject.build_model(task, seed=1)
        problem = _load_problem(other, state)
        evidence.equal(
            f"{task}.strict_load", problem, expected="", reason="what the model itself has saved"
        )
        if problem:
            continue
        for first, second in part.spec.tied:
            tensors = other.state_dict(keep_vars=True)
            evidence.equal(
                f"{task}.{second}.tied",
                tensors[first].data_ptr() == tensors[second].data_ptr(),
                expected=True,
                reason=f"declared to share one tensor with {first}",
            )
        changed = _changed(part.model, other)
        expect_none(evidence, f"{task}.changed", changed, "tensors", "bitwise equal, dtype kept")
        for mode in (True, False):
            losses = [loss_of(subject, m.train(mode), part.batch) for m in (part.model, other)]
            evidence.equal(
                f"{task}.loss" if mode else f"{task}.evaluation_loss",
                losses[1],
                expected=losses[0],
                unit="nats",
                reason="same weights",
            )
        expect_none(
            evidence,
            f"{task}.missing_keys_accepted",
            _accepted_without(subject, other, state),
            "weights",
            "a state dict without one quantized weight does not load strictly",
        )


def _load_problem(model, state):
    """What strict loading says against a state dict; empty where it takes it."""
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:  # torch says RuntimeError; a subject's own loader may say anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _changed(model, other):
    changed = Count()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = dict(other.named_parameters()) | dict(other.named_buffers())
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            changed.see(f"{name} is in one model only", True)
            continue
        one, two = before[name], after[name]
        changed.see(name, one.dtype != two.dtype or not torch.equal(one, two))
    return changed


def _accepted_without(subject, model, state):
    """Quantized weights whose key may be missing from a state dict that is loaded strictly."""
    accepted = Count()
    tensors = model.state_dict(keep_vars=True)
    for name, latent in subject.latent_weights(model).items():
        keys = {key for key, tensor in tensors.items() if tensor is latent}
        incomplete = {key: tensor for key, tensor in state.items() if key not in keys}
        accepted.see(name, not _load_problem(model, incomplete))
    return accepted
