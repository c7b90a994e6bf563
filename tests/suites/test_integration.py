"""Integration and phase-4 checks: each goes red for a defect of reader, writer or connector."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from forge_harness.canonical import canonical_json
from forge_harness.drill.defects import all_defects
from forge_harness.formats import gguf_writer, hf_config, hf_found, hf_writer, native, native_v09
from forge_harness.formats.checkpoint import Detection
from forge_harness.formats.manifest import MANIFEST, write_manifest
from forge_harness.integration import metrics_sync, phase4_connector
from forge_harness.paths import fixtures_dir
from forge_harness.subject.checkpoint import CheckpointSubject
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import start
from forge_harness.types import Outcome

GOLDEN = fixtures_dir() / "checkpoints" / "hf-packed-bitlinear-untied"
MEASURED = (
    "integration.compat_v1_0",
    "integration.compat_v0_9",
    "integration.compat_legacy",
    "integration.compat_custom",
    "integration.metrics_sync",
    "integration.third_party_readers",
    "transitions.phase4_to_phase5",
)
EXPORTS = (
    "integration.registry_round_trip",
    "integration.scenario_workflow",
    "integration.scenario_recovery",
)


@pytest.fixture(scope="module")
def held():
    """A checkpoint as subject: fast, and a subject that cannot train."""
    return CheckpointSubject(GOLDEN)


class Packer:
    """Packs, and has neither checkpoint nor export."""

    name = "packer"

    def pack(self, codes): ...
    def unpack(self, packed, rows): ...


@pytest.mark.parametrize("check", [*MEASURED, *EXPORTS])
def test_a_subject_without_checkpoint_or_export_is_not_measured(run_check, check):
    assert run_check(check, Packer()).outcome is Outcome.NOT_MEASURED


@pytest.mark.parametrize("check", EXPORTS)
def test_of_a_foreign_checkpoint_no_training_is_said(run_check, held, check):
    assert run_check(check, held).outcome is Outcome.NOT_MEASURED


@pytest.mark.parametrize("check", MEASURED)
def test_a_sound_checkpoint_passes(run_check, held, check):
    run = run_check(check, held)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("check", ["integration.compat_v1_0", "transitions.phase4_to_phase5"])
def test_the_reference_subject_passes(run_check, check):
    run = run_check(check, ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class OwnFamily(ReferenceSubject):
    """Exports models of a family that only it knows."""

    def export_package(self, session, path):
        super().export_package(session, path)
        file = path / "forge.json"
        described = json.loads(file.read_text(encoding="utf-8"))
        described["model"] |= {"family": "of-my-own", "config": {}}
        described["tied"] = {}
        file.write_bytes(canonical_json(described))
        (path / MANIFEST).unlink()
        write_manifest(path)


def test_a_family_that_no_other_reader_has_is_not_measured(run_check):
    """It was the KeyError of a name that models of Llama have."""
    run = run_check("integration.third_party_readers", OwnFamily())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "bitnet, llama, byte-lm" in run.reason


def off_scale(scales):
    return lambda *arguments: scales(*arguments) * 1.01


def v1_scale_off(patch):
    patch.setattr(native, "read_scales", off_scale(native.read_scales))


def v09_not_inverted(patch):
    patch.setattr(native_v09, "_scale", lambda *a, _real=native_v09._scale: 1 / _real(*a))


def fake_requantized(patch):
    from forge_harness.formats import legacy

    patch.setattr(hf_found, "stored_weights", legacy.masters)


def truncated(patch):
    from forge_harness.formats import weights

    def codes(w, scale):
        return (w.float() / scale).clamp(-1, 1).to(torch.int8)

    patch.setattr(weights, "ternary_codes", codes)


def convention_swapped(patch):
    swapped = property(lambda q: "multiply" if q.linear_class == "bitlinear" else "divide")
    patch.setattr(hf_config.Quantization, "scale_convention", swapped)


def order_swapped(patch):
    """Fields are taken from the other end of the byte."""
    from forge_harness.formats import tensors

    def fields(self, start, stop):
        quarter = self.packed.shape[0]
        rows = torch.arange(start, stop)
        shifts = (6 - 2 * (rows // quarter)).to(torch.uint8)[:, None]
        return (self.packed[rows % quarter] >> shifts) & 3

    patch.setattr(tensors.TernaryTensor, "fields", fields)


def convention_guessed(patch):
    real = phase4_connector.detect
    patch.setattr(
        phase4_connector,
        "detect",
        lambda path: dataclasses.replace(real(path), questions=()),
    )


def detected_by_name(patch):
    real = phase4_connector.detect

    def guess(path):
        return Detection("hf-packed", ("the name says so",), questions=real(path).questions)

    patch.setattr(phase4_connector, "detect", guess)


def reader_that_writes(patch):
    real = phase4_connector.open_checkpoint

    def touch(path, options=None):
        (path / "seen.txt").write_text("x")
        return real(path, options)

    patch.setattr(phase4_connector, "open_checkpoint", touch)


def units_ignored(patch):
    real = metrics_sync._state
    patch.setattr(
        metrics_sync, "_state", lambda target, n, unit: real(target, n, target and target.unit)
    )


def nan_meets(patch):
    patch.setattr(metrics_sync, "_meets", lambda number, target: not number < target.value)
    patch.setattr(metrics_sync.math, "isfinite", lambda number: True)


def latents_shrunk(patch):
    patch.setattr(start, "latent_of", lambda t: t.codes().float() * t.row_scales())
    patch.setattr(start, "require_same", lambda *a: None)


def latents_fresh(patch):
    patch.setattr(start, "latent_of", lambda t: torch.randn(t.shape))
    patch.setattr(start, "require_same", lambda *a: None)


DEFECTS = [
    ("integration.compat_v1_0", v1_scale_off, "misread_tensors"),
    ("integration.compat_v0_9", v09_not_inverted, "misread_tensors"),
    ("integration.compat_legacy", fake_requantized, "misread_tensors"),
    ("integration.compat_legacy", truncated, "misread_tensors"),
    ("integration.compat_custom", convention_swapped, "misread_tensors"),
    ("integration.compat_custom", order_swapped, "misread_tensors"),
    ("integration.compat_v1_0", order_swapped, "misread_tensors"),
    ("integration.compat_custom", convention_guessed, "guessed"),
    ("integration.compat_custom", detected_by_name, "misread_tensors"),
    ("integration.metrics_sync", units_ignored, "wrong_states"),
    ("integration.metrics_sync", nan_meets, "wrong_states"),
]


@pytest.mark.parametrize(("check", "defect", "named"), DEFECTS)
def test_a_seeded_defect_is_named(run_check, held, monkeypatch, check, defect, named):
    defect(monkeypatch)
    run = run_check(check, held)
    assert run.outcome is Outcome.FAIL
    assert named in run.reason


@pytest.mark.parametrize(
    ("defect", "named"), [(latents_shrunk, "scale_distance"), (latents_fresh, "codes_that_differ")]
)
def test_training_that_starts_elsewhere_is_named(run_check, monkeypatch, defect, named):
    defect(monkeypatch)
    run = run_check("transitions.phase4_to_phase5", ReferenceSubject())
    assert run.outcome is Outcome.FAIL
    assert named in run.reason


def test_a_reader_that_changes_its_source_is_named(run_check, monkeypatch):
    reader_that_writes(monkeypatch)
    run = run_check("transitions.phase4_to_phase5", ReferenceSubject())
    assert run.outcome in (Outcome.FAIL, Outcome.ERROR)
    assert "seen.txt" in run.reason or "changed" in run.reason


EXPORTED = [d for d in all_defects().values() if d.check in MEASURED]


@pytest.mark.parametrize("defect", EXPORTED, ids=lambda d: d.id)
def test_an_export_that_is_not_the_trained_model_is_named(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome is Outcome.FAIL
    assert defect.shows in run.reason


def test_an_export_with_other_codes_is_named_by_other_readers_too(run_check):
    subject = all_defects()["P09_exported_rows_reversed"].subject()
    run = run_check("integration.third_party_readers", subject)
    assert run.outcome is Outcome.FAIL
    assert "own_export_misread is" in run.reason


def inverse_written(patch):
    """Writes the reciprocal under a configuration that says multiply, and reads it back alike."""
    real = torch.reciprocal
    write = hf_writer._write_tensors

    def swapped(source, plan, directory, specs, tensor):
        def other(name):
            value = tensor(name)
            return real(value) if name.endswith("_scale") else value

        write(source, plan, directory, specs, other)

    patch.setattr(hf_writer, "_write_tensors", swapped)
    patch.setattr(hf_config.Quantization, "scale_convention", property(lambda q: "divide"))


def fp16_scale_off(patch):
    real = gguf_writer.tq.encode
    patch.setattr(gguf_writer.tq, "encode", lambda kind, t, d: real(kind, t, d + 1))


@pytest.mark.parametrize(
    ("defect", "named"), [(inverse_written, "layer_error"), (fp16_scale_off, "fp16|forge.scales")]
)
def test_a_writer_no_other_reader_agrees_with_is_named(run_check, monkeypatch, defect, named):
    import re

    subject = CheckpointSubject(fixtures_dir() / "checkpoints" / "hf-packed-autobitlinear-untied")
    defect(monkeypatch)
    run = run_check("integration.third_party_readers", subject)
    assert run.outcome in (Outcome.FAIL, Outcome.ERROR)
    assert re.search(named, run.reason), run.reason
