from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from forge_harness.formats.manifest import write_manifest
from forge_harness.model import BitLinear, ByteLM, ByteLMConfig, DigitsModel
from forge_harness.protocols import Precision, TrainOptions
from forge_harness.quant import TernaryLinearOp, absmean_ternary
from forge_harness.training import (
    PackageError,
    QATSession,
    evaluate_package,
    export_package,
    load_package,
    open_package,
    package_model,
    reference_model,
)

FILES = ["forge.json", "manifest.json", "model.safetensors"]
SMALL = ByteLMConfig(width=32, heads=2, hidden=64, fused_qkv=True, sub_norm=True, context=16)


def trained(task: str, *, steps: int = 3, **fields: object) -> QATSession:
    session = QATSession(task, TrainOptions(steps=6, batch_size=8, **fields))  # type: ignore[arg-type]
    for _ in range(steps):
        session.step()
    return session


def config_of(path: Path) -> dict:
    return json.loads((path / "forge.json").read_bytes())


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Changes forge.json and vouches for it."""
    config = config_of(path)
    change(config)
    (path / "forge.json").write_text(json.dumps(config))
    write_manifest(path)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("compute", ["exact", "int8", "fake"])
def test_package_evaluates_exactly_as_the_session(tmp_path: Path, compute: str) -> None:
    session = trained("digits#2", extra={"compute": compute})
    export_package(session, tmp_path / "package")
    assert evaluate_package("digits#2", tmp_path / "package") == session.evaluate()
    # The integer modes give the same bits, and a package names the one that runs anywhere.
    stated = config_of(tmp_path / "package")["quantization"]["compute"]
    assert stated == ("fake" if compute == "fake" else "exact")


def test_language_model_package_gives_the_same_logits(tmp_path: Path) -> None:
    session = trained("bytes#small")
    export_package(session, tmp_path)
    model = load_package(reference_model("bytes#small", 7), tmp_path)
    tokens = torch.arange(128).reshape(1, 128)
    with torch.no_grad():
        assert torch.equal(model(tokens), session.model.eval()(tokens))
    assert model.head.weight is model.embedding.weight
    assert config_of(tmp_path)["tied"] == {"head.weight": "embedding.weight"}
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")


def fused(task: str, seed: int, precision: Precision) -> nn.Module:
    torch.manual_seed(seed)
    return ByteLM(SMALL, precision=precision)


def test_fused_projections_keep_one_scale_a_part(tmp_path: Path) -> None:
    session = QATSession("bytes", TrainOptions(steps=1), build_model=fused)
    with torch.no_grad():
        session.model.blocks[0].attention.qkv.weight[:32] *= 50
    export_package(session, tmp_path)
    scales = load_file(tmp_path / "model.safetensors")["blocks.0.attention.qkv.weight_scale"]
    assert scales.shape == (3,)
    assert scales[0] > 20 * scales[1]
    assert config_of(tmp_path)["quantized"]["blocks.0.attention.qkv.weight"] == {
        "shape": [96, 32],
        "parts": [32, 32, 32],
    }
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        wanted = session.model.eval()(tokens)
        assert torch.equal(load_package(fused("bytes", 1, "ternary"), tmp_path)(tokens), wanted)
        assert torch.equal(package_model(tmp_path)(tokens), wanted)


def unpacked(packed: np.ndarray, rows: int) -> np.ndarray:
    """By the definition in docs/formats.md: field i of byte (r, c) is row i * R + r."""
    fields = [(packed >> (2 * i)) & 3 for i in range(4)]
    return np.concatenate(fields)[:rows].astype(np.int64) - 1


def test_files_hold_two_bit_codes_and_the_scale_of_training(tmp_path: Path) -> None:
    session = trained("digits")
    export_package(session, tmp_path)
    assert names(tmp_path) == FILES
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in session.model.named_modules():
        if isinstance(layer, BitLinear):
            codes, scale = absmean_ternary(layer.weight.detach())
            own = stored[f"{name}.weight"]
            assert own.dtype == np.uint8
            assert np.array_equal(unpacked(own, layer.out_features), codes.numpy())
            kept = stored[f"{name}.weight_scale"]
            assert kept.dtype == np.float32
            assert kept.tobytes() == scale.reshape(1).numpy().tobytes()
    assert np.array_equal(
        stored["blocks.1.norm.weight"], session.model.blocks[1].norm.weight.detach()
    )
    assert (tmp_path / "model.safetensors").stat().st_size < 16_000 < 150_016


def test_configuration_says_what_was_trained(tmp_path: Path) -> None:
    session = trained("digits#1", seed=5)
    export_package(session, tmp_path)
    config = config_of(tmp_path)
    assert config["format"] == "forge-package"
    assert config["version"] == "1.0"
    assert config["model"] == {"family": "digits", "config": asdict(session.model.config)}
    assert config["extras"] == {"task": "digits#1", "step": 3, "seed": 5}


def test_manifest_is_that_of_the_last_export(tmp_path: Path) -> None:
    session = trained("digits")
    export_package(session, tmp_path / "package")
    first = (tmp_path / "package/manifest.json").read_bytes()
    session.step()
    export_package(session, tmp_path / "package")
    content = (tmp_path / "package/manifest.json").read_bytes()
    assert content != first
    listed = {entry["path"]: entry for entry in json.loads(content)["files"]}
    assert sorted(listed) == ["forge.json", "model.safetensors"]
    for path, entry in listed.items():
        raw = (tmp_path / "package" / path).read_bytes()
        assert entry["bytes"] == len(raw)
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
    assert names(tmp_path) == ["package"]
    assert evaluate_package("digits", tmp_path / "package") == session.evaluate()


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        export_package(trained("digits"), tmp_path / place)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("task", ["digits", "bytes#small"])
def test_export_leaves_training_as_it_was(tmp_path: Path, task: str) -> None:
    through = trained(task, steps=4)
    exported = trained(task, steps=2)
    modes = [module.training for module in exported.model.modules()]
    export_package(exported, tmp_path / "package")
    assert [module.training for module in exported.model.modules()] == modes
    exported.step()
    export_package(exported, tmp_path / "package")
    exported.step()
    one, two = through.state_tensors(), exported.state_tensors()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].numpy().tobytes() == two[name].numpy().tobytes(), name


def test_what_is_no_package_is_not_replaced(tmp_path: Path) -> None:
    session = trained("digits")
    export_package(session, tmp_path / "package")
    (tmp_path / "package/notes.txt").write_text("mine")
    with pytest.raises(PackageError, match=r"holds 'notes\.txt'"):
        export_package(session, tmp_path / "package")
    assert names(tmp_path / "package") == sorted([*FILES, "notes.txt"])
    with pytest.raises(PackageError, match=r"holds 'notes\.txt'"):
        export_package(session, tmp_path / "package/notes.txt")
    (tmp_path / "package/model.safetensors").write_bytes(b"damaged")
    (tmp_path / "package/notes.txt").unlink()
    export_package(session, tmp_path / "package")
    assert evaluate_package("digits", tmp_path / "package") == session.evaluate()


def test_link_to_a_package_stays_a_link(tmp_path: Path) -> None:
    export_package(trained("digits"), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    session = trained("digits", steps=4)
    export_package(session, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]
    assert evaluate_package("digits", tmp_path / "real") == session.evaluate()


def test_failed_export_leaves_the_old_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = trained("digits")
    export_package(session, tmp_path / "package")
    before = session.evaluate()
    session.step()
    with torch.no_grad():
        session.model.blocks[0].norm.weight[3] = float("nan")
    with pytest.raises(PackageError, match=r"'blocks\.0\.norm\.weight' holds nan at index 3"):
        export_package(session, tmp_path / "package")
    assert names(tmp_path) == ["package"]
    assert evaluate_package("digits", tmp_path / "package") == before


def test_full_precision_model_is_not_packaged(tmp_path: Path) -> None:
    session = QATSession("digits", TrainOptions(precision="full"))
    with pytest.raises(PackageError, match="no ternary layer"):
        export_package(session, tmp_path)
    assert names(tmp_path) == []


def own_arithmetic(session: QATSession) -> None:
    def own(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return TernaryLinearOp()(x, w, bias)

    for module in session.model.modules():
        if isinstance(module, BitLinear):
            op = module.linear
            module.linear = own
            module._effective = op.effective_weight  # type: ignore[method-assign, union-attr]


def test_foreign_arithmetic_is_packaged_by_its_effective_weight(tmp_path: Path) -> None:
    session = trained("digits")
    expected = session.evaluate()
    own_arithmetic(session)
    export_package(session, tmp_path)
    assert evaluate_package("digits", tmp_path) == expected


def test_foreign_arithmetic_of_a_zero_weight_is_packaged(tmp_path: Path) -> None:
    session = trained("digits")
    with torch.no_grad():
        session.model.head.weight.zero_()
    own_arithmetic(session)
    export_package(session, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert (stored["head.weight"] == 0x55).all()
    assert stored["head.weight_scale"] > 0


def test_weights_that_are_not_ternary_are_refused(tmp_path: Path) -> None:
    session = trained("digits")
    session.model.head.linear = torch.nn.functional.linear
    with pytest.raises(PackageError, match="'head' is not ternary"):
        export_package(session, tmp_path)


@pytest.mark.parametrize(
    ("scale", "what"),
    [
        (torch.tensor(0.0), r"'stem' has scales \[0\.0\]"),
        (torch.tensor(-1.0), r"'stem' has scales \[-1\.0\]"),
        (torch.tensor(float("nan")), r"'stem' has scales \[nan\]"),
        (torch.ones(64), "'stem' has one scale a row"),
    ],
)
def test_scales_that_no_package_holds_are_refused(tmp_path: Path, scale: Tensor, what: str) -> None:
    session = trained("digits")
    session.model.stem.linear = TernaryLinearOp(
        quantize_weight=lambda w: (absmean_ternary(w)[0], scale)
    )
    with pytest.raises(PackageError, match=what):
        export_package(session, tmp_path)
    assert names(tmp_path) == []


def test_codes_that_are_not_ternary_are_refused(tmp_path: Path) -> None:
    session = trained("digits")
    session.model.stem.linear = TernaryLinearOp(
        quantize_weight=lambda w: (2 * absmean_ternary(w)[0], absmean_ternary(w)[1])
    )
    with pytest.raises(PackageError, match="Layer 'stem'"):
        export_package(session, tmp_path)


class Shared(nn.Module):
    """One layer under two names, and a table that shares the latent of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BitLinear(64, 64)
        self.again = self.first
        self.last = BitLinear(64, 10)
        self.table = nn.Embedding(10, 64)
        self.table.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.first(x)))


def shared(task: str, seed: int, precision: Precision) -> nn.Module:
    torch.manual_seed(seed)
    return Shared()


def test_latent_weights_are_not_shipped_under_a_second_name(tmp_path: Path) -> None:
    session = QATSession("digits", TrainOptions(steps=1), build_model=shared)
    export_package(session, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name, t in stored.items() if t.dtype == np.uint8} == {
        "first.weight",
        "again.weight",
        "last.weight",
    }
    assert np.array_equal(stored["table.weight"], session.model.table.weight.detach().numpy())
    assert evaluate_package("digits", tmp_path, build_model=shared) == session.evaluate()


def test_model_is_built_from_the_files_alone(tmp_path: Path) -> None:
    session = trained("digits", seed=3)
    export_package(session, tmp_path)
    state = torch.get_rng_state()
    model = package_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, DigitsModel)
    assert not any(module.training for module in model.modules())
    assert model.config == session.model.config
    pixels = torch.rand(5, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels), session.model.eval()(pixels))


def test_model_its_configuration_does_not_describe_is_of_unknown_family(tmp_path: Path) -> None:
    session = trained("digits")
    session.model.blocks[0].down.norm = None
    export_package(session, tmp_path)
    assert config_of(tmp_path)["model"] == {"family": "unknown", "config": {}}
    with pytest.raises(PackageError, match="family 'unknown'"):
        package_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["model"]["config"].pop("residual_init"), "lacks or adds 'residual_init'"),
        (lambda c: c["model"]["config"].update(dropout=0.1), "lacks or adds 'dropout'"),
        (lambda c: c["model"]["config"].pop("width"), "'width'"),
        (lambda c: c["model"]["config"].update(sub_norm=False), r"'blocks\.0\.down\.norm\.weight'"),
        (lambda c: c["model"].update(family="bert"), "family 'bert'"),
    ],
)
def test_model_that_the_files_do_not_describe_is_not_built(
    tmp_path: Path, change: Callable[[dict], object], what: str
) -> None:
    export_package(trained("digits"), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(PackageError, match=what):
        package_model(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_damage_is_noticed(tmp_path: Path, file: str) -> None:
    export_package(trained("digits"), tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / file).write_bytes(content)
    with pytest.raises(PackageError, match=r"manifest\.json") as caught:
        evaluate_package("digits", tmp_path)
    assert caught.value.exit_code == 8


def test_package_of_another_model_is_refused(tmp_path: Path) -> None:
    export_package(trained("digits"), tmp_path)
    with pytest.raises(PackageError, match="the model it was exported from"):
        evaluate_package("bytes#small", tmp_path)
    rewrite(tmp_path, lambda c: c.update(version="1.1"))
    with pytest.raises(PackageError, match=r"version 1\.1, this release reads up to 1\.0"):
        evaluate_package("digits", tmp_path)


def test_package_with_other_parts_is_refused(tmp_path: Path) -> None:
    session = QATSession("bytes", TrainOptions(steps=1), build_model=fused)
    export_package(session, tmp_path)
    model = fused("bytes", 0, "ternary")
    model.blocks[0].attention.qkv.parts = (16, 32, 48)
    with pytest.raises(PackageError, match=r"parts of \(32, 32, 32\) rows"):
        load_package(model, tmp_path)


def test_what_is_no_package_is_not_opened(tmp_path: Path) -> None:
    for place, sentence in ((tmp_path, "holds nothing"), (tmp_path / "none", "does not exist")):
        with pytest.raises(PackageError, match=sentence):
            evaluate_package("digits", place)
    (tmp_path / "config.json").write_text('{"format": "forge-package/0.9"}')
    with pytest.raises(PackageError, match="convert it"), open_package(tmp_path):
        pass


def test_a_pipe_in_a_package_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "forge-package/1.0"}')
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(PackageError, match="is a pipe"), open_package(tmp_path):
        pass
