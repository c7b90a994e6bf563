"""Latent weights made from codes: training quantizes them to the codes and scales stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge_harness.errors import CheckpointError
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.tensors import TernaryTensor
from forge_harness.protocols import TrainOptions
from forge_harness.quant import absmean_ternary
from forge_harness.training import train_to_directory
from forge_harness.training.start import latent_of, read_start, require_same, start_of, ulps

SHAPES = [(1, 1), (1, 300), (300, 1), (3, 5), (64, 64), (128, 64), (256, 256), (768, 256)]


def ternary(codes: torch.Tensor, scale: float) -> TernaryTensor:
    return TernaryTensor.from_codes(codes, torch.tensor([scale]))


def distance(stored: TernaryTensor) -> float:
    latent = latent_of(stored)
    require_same("w", latent, stored)
    return ulps(float(absmean_ternary(latent)[1]), float(stored.scales[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_of_any_trained_matrix_is_reached_exactly(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in torch.logspace(-3, 2, 12).tolist():
        weight = torch.randn(shape, generator=generator) * spread
        codes, scale = absmean_ternary(weight)
        if codes.any():
            assert distance(ternary(codes, float(scale))) == 0.0


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_any_scale_at_all_is_reached_to_an_ulp(density: float) -> None:
    """A scale that some other quantizer made need not be the mean of any fp32 magnitudes."""
    generator = torch.Generator().manual_seed(1)
    for scale in torch.rand(12, generator=generator).tolist():
        kept = torch.rand(96, 64, generator=generator) < density
        codes = torch.randn(96, 64, generator=generator).sign().where(kept, 0.0).to(torch.int8)
        codes[0, 0] = 1
        assert distance(ternary(codes, scale + 1e-4)) <= 1


@pytest.mark.parametrize("scale", [1e-9, 3e38, float("inf"), float("nan")])
def test_a_scale_no_quantizer_makes_is_refused(scale: float) -> None:
    stored = ternary(torch.ones(4, 4, dtype=torch.int8), scale)
    with pytest.raises(CheckpointError, match="open it for inference only"):
        require_same("w", latent_of(stored), stored)


def test_training_starts_from_every_matrix_of_a_byte_model(tmp_path: Path) -> None:
    train_to_directory("bytes", tmp_path / "run", TrainOptions(steps=4, batch_size=2))
    package = tmp_path / "run" / "package"
    with open_checkpoint(package) as opened:
        start = start_of(opened)
        for name in opened.ternary_names():
            stored = opened.ternary(name)
            codes, scale = absmean_ternary(start.weights[name])
            assert torch.equal(codes, stored.codes())
            assert float(scale) == float(stored.scales[0])
    assert read_start(package).weights.keys() == start.weights.keys()
