from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from forge_harness.model import BitLinear, ByteLM, ByteLMConfig
from forge_harness.protocols import Precision, TrainOptions
from forge_harness.quant import TernaryLinearOp, absmean_ternary
from forge_harness.training import (
    PackageError,
    QATSession,
    evaluate_package,
    export_package,
    load_package,
    reference_model,
)
from forge_harness.training.package import CONFIG, WEIGHTS, read_package


def trained(task: str, **fields: object) -> QATSession:
    session = QATSession(task, TrainOptions(steps=3, batch_size=8, **fields))  # type: ignore[arg-type]
    for _ in range(3):
        session.step()
    return session


@pytest.mark.parametrize("compute", ["exact", "int8", "fake"])
def test_package_evaluates_exactly_as_the_session(tmp_path: Path, compute: str) -> None:
    session = trained("digits#2", extra={"compute": compute})
    export_package(session, tmp_path / "package")
    assert evaluate_package("digits#2", tmp_path / "package") == session.evaluate()
    # The integer modes give the same bits, and a package names the one that runs anywhere.
    config, _ = read_package(tmp_path / "package")
    assert config["compute"] == ("fake" if compute == "fake" else "exact")


def test_language_model_package_gives_the_same_logits(tmp_path: Path) -> None:
    session = trained("bytes#small")
    export_package(session, tmp_path)
    model = load_package(reference_model("bytes#small", 7), tmp_path)
    tokens = torch.arange(128).reshape(1, 128)
    with torch.no_grad():
        assert torch.equal(model(tokens), session.model.eval()(tokens))
    assert model.head.weight is model.embedding.weight


def fused(task: str, seed: int, precision: Precision) -> nn.Module:
    torch.manual_seed(seed)
    return ByteLM(ByteLMConfig(width=32, heads=2, hidden=64, fused_qkv=True), precision=precision)


def test_fused_projections_keep_one_scale_a_part(tmp_path: Path) -> None:
    session = QATSession("bytes", TrainOptions(steps=1), build_model=fused)
    with torch.no_grad():
        session.model.blocks[0].attention.qkv.weight[:32] *= 50
    export_package(session, tmp_path)
    _, tensors = read_package(tmp_path)
    scales = tensors["blocks.0.attention.qkv.scales"]
    assert scales.shape == (3,)
    assert scales[0] > 20 * scales[1]
    assert evaluate_package("bytes", tmp_path, build_model=fused) == session.evaluate()


def test_files_hold_two_bit_codes_and_the_scale_of_training(tmp_path: Path) -> None:
    session = trained("digits")
    export_package(session, tmp_path)
    config, tensors = read_package(tmp_path)
    layer = session.model.head
    assert isinstance(layer, BitLinear)
    _, scale = absmean_ternary(layer.weight.detach())
    assert tensors["head.codes_i2"].shape == (3, 64)
    assert tensors["head.codes_i2"].dtype == torch.uint8
    assert torch.equal(tensors["head.scales"], scale.reshape(1))
    assert config["quantized"]["head"] == {"shape": [10, 64], "parts": [10]}
    assert "head.weight" not in tensors
    assert (tmp_path / WEIGHTS).stat().st_size < 16_000 < 150_016


def test_full_precision_model_is_not_packaged(tmp_path: Path) -> None:
    session = QATSession("digits", TrainOptions(precision="full"))
    with pytest.raises(PackageError, match="no ternary layer"):
        export_package(session, tmp_path)


def test_foreign_arithmetic_is_packaged_by_its_effective_weight(tmp_path: Path) -> None:
    def own(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return TernaryLinearOp()(x, w, bias)

    session = trained("digits")
    expected = session.evaluate()
    for module in session.model.modules():
        if isinstance(module, BitLinear):
            op = module.linear
            module.linear = own
            module._effective = op.effective_weight  # type: ignore[method-assign, union-attr]
    export_package(session, tmp_path)
    assert evaluate_package("digits", tmp_path) == expected


def test_weights_that_are_not_ternary_are_refused(tmp_path: Path) -> None:
    session = trained("digits")
    session.model.head.linear = torch.nn.functional.linear
    with pytest.raises(PackageError, match="'head' is not ternary"):
        export_package(session, tmp_path)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_damage_is_noticed(tmp_path: Path, file: str) -> None:
    export_package(trained("digits"), tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / file).write_bytes(content)
    with pytest.raises(PackageError):
        evaluate_package("digits", tmp_path)


def test_package_of_another_model_is_refused(tmp_path: Path) -> None:
    export_package(trained("digits"), tmp_path)
    with pytest.raises(PackageError, match="the model it was exported from"):
        evaluate_package("bytes#small", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_bytes())
    config["format"] = "forge-package/9"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(PackageError, match="forge-package/9"):
        evaluate_package("digits", tmp_path)
