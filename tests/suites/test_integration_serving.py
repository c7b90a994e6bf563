"""Integration, served_equals_trained: red for a reference server with one defect."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_harness import training
from forge_harness.formats.manifest import write_manifest
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CARELESS = Path(__file__).with_name("careless_server.py")
CHECK = "integration.served_equals_trained"


class Careless(ReferenceSubject):
    """The reference subject, whose servers have a defect; its answers stay those of the model."""

    def __init__(self, defect):
        self._defect = defect

    def server(self, directory, *, secured=False):
        spec = super().server(directory, secured=secured)
        spec, *others = (self._with_defect(each) for each in (spec, *spec.others))
        return replace(spec, others=tuple(others))

    def _with_defect(self, spec):
        after = spec.command.index("serve") + 1
        command = (sys.executable, str(CARELESS), self._defect, *spec.command[after:])
        return replace(spec, command=command)


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        ("ignores_the_temperature", "wrong answer (tokens)"),
        ("ignores_the_seed", "wrong answer (tokens)"),
        ("stands_still_after_position_40", "wrong answer (tokens)"),
        ("tells_the_text_backwards", "wrong answer (text_sha256)"),
        ("gives_rows_to_the_wrong_job", "wrong answer (labels)"),
    ],
)
def test_a_careless_server_is_found(run_check, defect, reason):
    run = run_check(CHECK, Careless(defect))
    assert run.outcome is Outcome.FAIL, run.reason
    assert reason in run.reason


@pytest.mark.usefixtures("trained_once")
def test_a_package_that_is_not_the_trained_model_is_found(run_check, monkeypatch):
    export = training.export_package

    def swapped(session, path):
        """Two rows of the embedding change places, in what is served."""
        export(session, path)
        tensors = load_file(path / "model.safetensors")
        name = next((n for n in tensors if "embedding" in n), None)
        if name is not None:
            tensors[name] = torch.roll(tensors[name], 1, 0)
            save_file(tensors, path / "model.safetensors")
            (path / "manifest.json").unlink()
            write_manifest(path)

    monkeypatch.setattr(training, "export_package", swapped)
    run = run_check(CHECK, ReferenceSubject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "wrong_alone is" in run.reason
    assert "wrong answer (tokens)" in run.reason
