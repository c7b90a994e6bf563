"""The export, as readers see it that this project did not write."""

import pytest

from forge_harness.evidence import largest
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration.reader_agreement import LAYER_RTOL, compare
from forge_harness.integration.third_party import (
    NotAvailable,
    read_with_gguf,
    read_with_llama_cpp,
    read_with_transformers,
)
from forge_harness.integration.trained_export import compare_with_trained
from forge_harness.protocols import (
    BuildsModel,
    ExportsWeights,
    HoldsCheckpoint,
    TrainOptions,
    Trains,
)

RUNNABLE = ("bitnet", "llama", "byte-lm")


@pytest.mark.forge_check("integration.third_party_readers")
def test_third_party_readers(subject, evidence, tmp_path):
    """Transformers and gguf read the export and agree with the codes it was made of.

    The export is the subject's: of its trained causal model, or the checkpoint it holds. Its codes,
    scales and other tensors are those of the trained model, where the subject trains.
    Oracles: transformers' own loader (nothing missing, unexpected or mismatched), its layers fed
    their own inputs against exact integer products in float64 (1e-6 relative), its logits against
    our model; `gguf` dequantizing every tensor to exactly codes * fp16(scale).
    """
    source = _source(subject, evidence, tmp_path)
    evidence.record("source", source.name, reason="the export that is read")
    convert(source, tmp_path / "hf", "hf-packed")
    _transformers(evidence, tmp_path)
    for to in ("gguf-tq2_0", "gguf-tq1_0"):
        _gguf(evidence, source, tmp_path / f"{to}.gguf", to)


def _source(subject, evidence, directory):
    """An export of the subject that transformers has a model for."""
    if all(isinstance(subject, each) for each in (BuildsModel, Trains, ExportsWeights)):
        causal = [task for task in subject.tasks() if subject.model_spec(task).causal]
        if causal:
            session = subject.session(causal[0], TrainOptions(steps=2))
            session.step()
            subject.export_package(session, directory / "export")
            compare_with_trained(evidence, subject, session, directory / "export")
            if _family(directory / "export") in RUNNABLE:
                return directory / "export"
    if isinstance(subject, HoldsCheckpoint):
        own = directory / "own"
        own.mkdir()
        path = subject.provide_checkpoint(own)
        if _family(path) in RUNNABLE:
            return path
    pytest.skip(
        "the subject neither exports a causal model (BuildsModel, Trains, ExportsWeights) nor "
        "holds a checkpoint of a family that transformers has a model for "
        f'({", ".join(RUNNABLE)}); if it has no causal model, declare causal_models = "none"'
    )


def _family(path):
    with open_checkpoint(path) as opened:
        return opened.model.family


def _transformers(evidence, directory):
    with open_checkpoint(directory / "hf") as opened:
        vocabulary = opened.infos["model.embed_tokens.weight"].shape[0]
        tokens = [[(7 * row + 11 * i) % vocabulary for i in range(16)] for row in range(2)]
        reading = read_with_transformers(directory / "hf", tokens, out=directory / "reading")
        if isinstance(reading, NotAvailable):
            pytest.skip(reading.reason)
        versions = ", ".join(f"{k} {v}" for k, v in sorted(reading.versions.items()))
        evidence.equal(
            "complaints",
            len(reading.complaints),
            expected=0,
            reason=f"of {versions}: {'; '.join(reading.complaints[:3]) or 'none'}",
        )
        agreement = compare(reading, opened)
    errors = [layer.relative_error for layer in agreement.layers]
    evidence.at_most(
        "layer_error",
        largest(errors),
        limit=LAYER_RTOL,
        reason=f"worst of {len(errors)} layers, each fed transformers' own input",
        samples=errors,
    )
    evidence.equal(
        "layers_one_side_lacks",
        len(agreement.unread),
        expected=0,
        unit="layers",
        reason="; ".join(agreement.unread[:3]) or "the same layers are ternary",
    )
    most, mean = agreement.logits.limits
    mode = (
        f"mode: {agreement.logits.mode}, {agreement.logits.flipped_codes} activation codes flipped"
    )
    evidence.at_most("logits_max", agreement.logits.max_over_std, limit=most, reason=mode)
    evidence.at_most("logits_mean", agreement.logits.mean_over_std, limit=mean, reason=mode)


def _gguf(evidence, source, path, to):
    convert(source, path, to)
    reading = read_with_gguf(path)
    if isinstance(reading, NotAvailable):
        pytest.skip(reading.reason)
    wrong = [tensor.name for tensor in reading.tensors if tensor.differing]
    evidence.record(f"{to}.tensors", len(reading.tensors), unit="tensors", reason="decoded by gguf")
    evidence.equal(
        f"{to}.differing",
        len(wrong) + bool(reading.refused),
        expected=0,
        unit="tensors",
        reason=reading.refused or "; ".join(wrong[:3]) or "exactly codes * fp16(scale)",
    )
    llama = read_with_llama_cpp(path, [[1, 2, 3]], out=path.parent / "llama")
    if isinstance(llama, NotAvailable):
        evidence.record(f"{to}.llama_cpp", "not asked", reason=llama.reason)
