"""Phase-4 checkpoints of every kind: read as their makers wrote them, at a measured loss."""

import pytest

from forge_harness.formats.convert import convert
from forge_harness.integration.metrics_sync import read_targets
from forge_harness.integration.trained_export import SCALE_ULP, compare_with_trained
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import BuildsModel, ExportsWeights, TrainOptions, Trains

from .conftest import measured_row, settle


@pytest.mark.forge_check("integration.compat_v1_0")
def test_version_1_0(subject, connector, golden, evidence, tmp_path):
    """A 1.0 package is read as made, converts to the same bytes, and loses nothing.

    Oracles: golden packages of an independent maker; a frozen trained model with its recorded
    accuracy; the subject's own checkpoint before it is written as a 1.0 package; for a subject that
    exports, the weights its own forward uses. Exact.
    """
    settle(evidence, connector, [case for case in golden if case.truth["format"] == "native"])
    row = measured_row(evidence, connector, "BitNet v1.0")
    evidence.equal("scale_change", row.scale_change, expected=0.0, reason="bit for bit")
    evidence.equal("impact", row.impact, expected=0.0, reason="share of accuracy lost")
    source = fixtures_dir() / "models" / "v1.0"
    convert(source, tmp_path / "again", "native")
    weights = "model.safetensors"
    evidence.equal(
        "bytes_kept",
        (tmp_path / "again" / weights).read_bytes() == (source / weights).read_bytes(),
        expected=True,
        reason="a package written again has the same weights, byte for byte",
    )
    before = own_checkpoint(subject, connector, evidence, tmp_path)
    convert(before.path, tmp_path / "own-1.0", "native")
    after = connector().load(tmp_path / "own-1.0")
    facts = [
        sorted(
            (weight.shape, weight.scales, weight.codes_sha256) for weight in read.ternary.values()
        )
        for read in (before, after)
    ]
    evidence.equal(
        "own_checkpoint_kept",
        facts[0] == facts[1],
        expected=True,
        reason="codes by digest and scales bit for bit, written as a 1.0 package and read again",
    )
    if all(isinstance(subject, each) for each in (BuildsModel, Trains, ExportsWeights)):
        session = subject.session(next(iter(subject.tasks())), TrainOptions(steps=2))
        session.step()
        subject.export_package(session, tmp_path / "own-export")
        compare_with_trained(evidence, subject, session, tmp_path / "own-export")


def own_checkpoint(subject, connector, evidence, directory):
    """Reads the subject's own checkpoint, of whatever kind it is: what the row is about."""
    place = directory / "own-checkpoint"
    place.mkdir()
    loaded = connector().load(subject.provide_checkpoint(place))
    evidence.at_least(
        "own_ternary_tensors",
        len(loaded.ternary),
        limit=1,
        unit="tensors",
        reason=f"read from the subject's own checkpoint, detected as {loaded.detection.format}",
    )
    return loaded


@pytest.mark.forge_check("integration.compat_v0_9")
def test_version_0_9(subject, connector, golden, evidence, tmp_path):
    """A 0.9 package keeps every code; scales move by one ulp at most; accuracy by under 2 %.

    Oracles: a golden package of an independent maker; a frozen trained model.
    """
    own_checkpoint(subject, connector, evidence, tmp_path)
    settle(evidence, connector, [case for case in golden if case.truth["format"] == "native-0.9"])
    row = measured_row(evidence, connector, "BitNet v0.9")
    evidence.at_most(
        "scale_change", row.scale_change, limit=SCALE_ULP, reason="1 / (1 / s), one ulp of fp32"
    )
    evidence.at_most(
        "impact",
        row.impact,
        limit=0.02,
        reason="share of accuracy lost; the specification allows 2 %",
    )


@pytest.mark.forge_check("integration.compat_legacy")
def test_legacy(subject, connector, golden, evidence, tmp_path):
    """Full precision is quantized on import as float64 does it; dense codes are never requantized.

    Oracles: golden files whose maker chose codes and scales first; float64 absmean quantization of
    a frozen full-precision model. The accuracy this costs is that of post-training ternarization:
    recorded, not limited, since it is a property of the model.
    """
    own_checkpoint(subject, connector, evidence, tmp_path)
    kinds = ("legacy-safetensors", "legacy-pt", "hf-fake-quant")
    settle(evidence, connector, [case for case in golden if case.truth["format"] in kinds])
    row = measured_row(evidence, connector, "Legacy Models")
    evidence.at_most(
        "scale_change", row.scale_change, limit=1e-6, reason="against the float64 absolute mean"
    )
    evidence.record(
        "impact", row.impact, reason="share of accuracy lost by import without training"
    )


@pytest.mark.forge_check("integration.compat_custom")
def test_custom(subject, connector, golden, evidence, tmp_path):
    """Foreign checkpoints are told from their files alone, and what files do not say is asked for.

    Oracles: golden Hugging Face and GGUF files of an independent maker, both scale conventions and
    all I2_S layouts among them; a frozen trained model whose scales divide.
    """
    kinds = ("hf-packed", "hf-online", "hf-unpacked")
    cases = [
        case
        for case in golden
        if case.truth["format"] in kinds or case.truth["format"].startswith("gguf")
    ]
    settle(evidence, connector, cases)
    silent = [
        case.name
        for case in cases
        if {"scale_convention", "i2s_layout"} & set(case.truth["options"])
        and not connector().detect(case.path).questions
    ]
    evidence.equal(
        "guessed",
        len(silent),
        expected=0,
        unit="checkpoints",
        reason=f"the files do not say, so it is asked for; guessed: {'; '.join(silent) or 'none'}",
    )
    row = measured_row(evidence, connector, "Custom BitNet")
    evidence.at_most(
        "scale_change", row.scale_change, limit=SCALE_ULP, reason="stored inverse, one ulp of fp32"
    )
    evidence.at_most("impact", row.impact, limit=0.0, reason="share of accuracy lost")
    own_checkpoint(subject, connector, evidence, tmp_path)


CASES = (
    # target (value, unit, direction), measured (value, unit), state
    ((0.9, "1", "at_least"), (0.9, "1"), "met"),
    ((0.9, "1", "at_least"), (0.899, "1"), "missed"),
    ((0.9, "1", "at_least"), (float("nan"), "1"), "missed"),
    ((0.1, "s", "at_most"), (0.1, "s"), "met"),
    ((0.1, "s", "at_most"), (99.0, "ms"), "unit mismatch"),
    ((0.1, "s", "at_most"), None, "not measured"),
    (None, (1.0, "1"), "not declared"),
)


@pytest.mark.forge_check("integration.metrics_sync")
def test_metrics_sync(subject, connector, evidence, tmp_path):
    """Targets and measurements meet by name and unit; nothing is converted, nothing passes unseen.

    Oracle: cases at, over and under a limit, in another unit, NaN, undeclared and unmeasured, each
    with the state written down.
    """
    wrong = []
    for index, (target, measured, expected) in enumerate(CASES):
        named = (
            {"m": dict(zip(("value", "unit", "direction"), target, strict=True))} if target else {}
        )

        targets = read_targets({"targets": named})
        (row,) = connector().sync_metrics(targets, {"m": measured} if measured else {})
        if row.state != expected:
            wrong.append(f"case {index}: {row.state} instead of {expected}")
    evidence.record("cases", len(CASES), reason="targets set against measurements")
    evidence.equal("wrong_states", len(wrong), expected=0, reason="; ".join(wrong) or "as written")
    targets = connector().load(subject.provide_checkpoint(tmp_path)).targets
    evidence.record("own_targets", len(targets), reason="declared by the subject's checkpoint")
