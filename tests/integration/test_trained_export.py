"""An export is compared with the trained model value by value, and with nothing it is not held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_harness.evidence import EvidenceFailure, Recorder
from forge_harness.integration.trained_export import compare_with_trained
from forge_harness.protocols import Batch, TrainOptions
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


class _Gained(torch.nn.Module):
    """A layer behind a gain, with a table, a scale that is learned and a head for training only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = torch.nn.RMSNorm(16)
        self.layer = torch.nn.Linear(16, 64)
        self.head, self.hint = torch.nn.Linear(64, 4), torch.nn.Linear(64, 4)
        self.step = torch.nn.Parameter(torch.ones(()))
        self.tied = torch.nn.Parameter(self.head.weight.data)
        self.register_buffer("table", torch.arange(16.0))
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def codes(self):
        codes, scale = absmean_ternary(self.layer.weight.detach())
        return codes, scale * self.step.detach()

    def forward(self, x):
        codes, scale = self.codes()
        mixed = self.norm(x) @ (codes * scale * self.step / self.step.detach()).t()
        return self.head(mixed + self.layer.bias) + 0 * mixed @ self.tied.t()


class Gained:
    """Exports all but what `without` names."""

    def __init__(self, *without: str) -> None:
        self.model, self.without = _Gained(), without

    def tasks(self):
        return ("points",)

    def example_batch(self, task, *, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(batch_size, 16, generator=generator)
        return Batch(inputs=inputs, targets=torch.arange(batch_size) % 4)

    def loss(self, model, batch):
        loss = torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        return loss + model.hint.weight.square().sum() if model.training else loss

    def effective_weights(self, model):
        codes, scale = model.codes()
        return {"layer": codes * scale}

    def latent_weights(self, model):
        return {"layer": model.layer.weight}

    def export(self, path: Path) -> None:
        codes, scale = self.model.codes()
        names = ("norm.weight", "layer.bias", "head.weight", "head.bias")
        state = self.model.state_dict()
        tensors = {name: state[name] for name in names if name not in self.without}
        tensors |= {"layer.weight": pack_i2(codes), "layer.weight_scale": 1 / scale.reshape(1)}
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        quantization = {"quant_method": "bitnet", "linear_class": "bitlinear"}
        config = {"model_type": "mine", "quantization_config": quantization}
        (path / "config.json").write_text(json.dumps(config))


def test_an_export_may_leave_out_what_follows_from_the_rest(tmp_path: Path) -> None:
    """A table, a tied matrix, a learned scale and a head for training; the model stays as it is."""
    subject = Gained()
    subject.export(tmp_path / "sound")
    before = {name: values.clone() for name, values in subject.model.state_dict().items()}
    subject.model.head.requires_grad_(False)
    evidence = Recorder([])
    compare_with_trained(evidence, subject, subject, tmp_path / "sound")
    assert subject.model.training
    assert not subject.model.head.weight.requires_grad
    assert all(torch.equal(before[n], v) for n, v in subject.model.state_dict().items())


@pytest.mark.parametrize("name", ["norm.weight", "layer.bias", "head.bias"])
def test_an_export_without_what_the_model_needs_is_named(name: str, tmp_path: Path) -> None:
    subject = Gained(name)
    subject.model.head.requires_grad_(False)
    subject.export(tmp_path / "export")
    with pytest.raises(EvidenceFailure, match=f"own_plain_tensors_left_out is 1 .*; {name}"):
        compare_with_trained(Recorder([]), subject, subject, tmp_path / "export")


def test_what_has_a_name_of_its_own_may_be_what_is_not_found(tmp_path: Path) -> None:
    subject = Gained("norm.weight")
    subject.export(tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    save_file({**load_file(file), "rms.gain": torch.ones(16)}, file)
    compare_with_trained(Recorder([]), subject, subject, tmp_path / "export")


class Multiplies:
    """Its layer quantizes as Hugging Face's do, by the reciprocal; latents are exported."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype, self.moved = _Layer(), dtype, 0.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.model.layer.weight.copy_(torch.randn(64, 16, generator=generator) / 64)

    def effective_weights(self, model):
        weight = model.layer.weight.detach()
        scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
        return {"layer": ((weight * scale).round().clamp(-1, 1) / scale).to(self.dtype)}

    def export(self, path: Path) -> None:
        tensors = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        tensors["layer.weight"][0, 0] += self.moved
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
        quantization["quantization_mode"] = "online"
        config = {"model_type": "mine", "quantization_config": quantization}
        (path / "config.json").write_text(json.dumps(config))


def _with_a_weight_in_the_middle() -> Multiplies:
    """Of which the product by the reciprocal makes another code than the division."""
    for seed in range(1000):
        subject = Multiplies(seed)
        weight = subject.model.layer.weight.detach()
        for _ in range(8):  # it is one of those the mean is of
            weight[0, 0] = weight.abs().mean() / 2
        codes = subject.effective_weights(subject.model)["layer"].sign().to(torch.int8)
        if not torch.equal(codes, absmean_ternary(weight)[0]):
            return subject
    raise AssertionError("no seed has one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_may_round_as_a_reciprocal_and_in_the_type_of_the_model(tmp_path, dtype) -> None:
    apart = 0
    for seed in range(20):
        subject = Multiplies(seed, dtype)
        subject.export(tmp_path / str(seed))
        compare_with_trained(Recorder([]), subject, subject, tmp_path / str(seed))
        _, scale = absmean_ternary(subject.model.layer.weight.detach())
        apart += subject.effective_weights(subject.model)["layer"].amax() != scale
    assert apart, "no scale was rounded otherwise"


def test_a_weight_in_the_middle_has_either_code_and_no_other_has(tmp_path) -> None:
    subject = _with_a_weight_in_the_middle()
    subject.export(tmp_path / "sound")
    compare_with_trained(Recorder([]), subject, subject, tmp_path / "sound")
    scale = float(subject.model.layer.weight.detach().abs().mean())
    refused = []
    # Beside the middle, on the side of the forward's code and on the other; the other sign.
    for moved in (1e-5 * scale, -1e-5 * scale, -1.5 * scale):
        subject.moved = moved
        subject.export(tmp_path / str(moved))
        try:
            compare_with_trained(Recorder([]), subject, subject, tmp_path / str(moved))
        except EvidenceFailure as error:
            refused.append("own_export_misread is 1 modules" in str(error))
    assert refused == [True, True]
