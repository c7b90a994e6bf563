"""An export is compared with the trained model value by value, and with nothing it is not held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge_harness.evidence import EvidenceFailure, Recorder
from forge_harness.integration.trained_export import compare_with_trained
from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject


class Halved(ReferenceSubject):
    """The first half of every row is multiplied by half the scale."""

    def effective_weights(self, model):
        weights = {
            name: values.clone() for name, values in super().effective_weights(model).items()
        }
        for values in weights.values():
            values[:, : values.shape[1] // 2] *= 0.5
        return weights


def _halved(values):
    middle = values.shape[1] // 2
    return torch.cat([values[:, :middle] * 0.5, values[:, middle:]], dim=1)


class NoModules(ReferenceSubject):
    """Says that nothing is quantized."""

    def effective_weights(self, model):
        return {}


def compare(subject: ReferenceSubject, folder: Path) -> None:
    session = subject.session("digits", TrainOptions(steps=2))
    session.step()
    subject.export_package(session, folder)
    compare_with_trained(Recorder([]), subject, session, folder)


def test_a_sound_export_is_held(tmp_path: Path) -> None:
    compare(ReferenceSubject(), tmp_path / "package")


@pytest.mark.parametrize(
    ("subject", "said"),
    [(Halved(), "is 6 modules"), (NoModules(), "the subject names no module")],
    ids=["halved", "no_modules"],
)
def test_an_export_of_other_values_is_not(subject, said: str, tmp_path: Path) -> None:
    """Signs and the largest value of each row were compared, of no module at all too."""
    with pytest.raises(EvidenceFailure, match=said):
        compare(subject, tmp_path / "package")
