"""An export is compared with the trained model value by value, and with nothing it is not held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forge_harness.evidence import EvidenceFailure, Recorder
from forge_harness.integration.trained_export import compare_with_trained
from forge_harness.protocols import TrainOptions
from forge_harness.quant import absmean_ternary, pack_i2
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


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(16, 64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class WithBias:
    """Written as transformers' AutoBitLinear reads it: biases over the scale."""

    def __init__(self, moved: float = 1.0) -> None:
        self.model, self.moved = _Layer(), moved

    def effective_weights(self, model):
        codes, scale = absmean_ternary(model.layer.weight.detach())
        return {"layer": codes * scale}

    def export(self, path: Path) -> None:
        codes, scale = absmean_ternary(self.model.layer.weight.detach())
        tensors = {
            "layer.weight": pack_i2(codes),
            "layer.weight_scale": scale.reshape(1),
            "layer.bias": self.model.layer.bias.detach() / scale * self.moved,
        }
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
        quantization["quantization_mode"] = "offline"
        config = {"model_type": "mine", "quantization_config": quantization}
        (path / "config.json").write_text(json.dumps(config))


def test_a_bias_that_is_stored_over_the_scale_may_round(tmp_path: Path) -> None:
    for moved, name in ((1.0, "sound"), (1.0 + 2.0**-20, "moved")):
        subject = WithBias(moved)
        subject.export(tmp_path / name)
        recorder = Recorder([])
        if moved == 1.0:
            compare_with_trained(recorder, subject, subject, tmp_path / name)
            continue
        with pytest.raises(EvidenceFailure, match="own_plain_tensors_differ is 1 tensors"):
            compare_with_trained(recorder, subject, subject, tmp_path / name)
