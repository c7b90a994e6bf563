"""The native package 0.9: a maker from docs/formats.md in numpy, against our reader."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from forge_harness.durable import staged_directory
from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions, TensorInfo, WriteOptions
from forge_harness.formats.native import open_native, write_native
from forge_harness.formats.native_v09 import open_native_v09, recognise
from forge_harness.model import ByteLM, ByteLMConfig

from .memory import HF_CONFIG, hf_checkpoint


def pack(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    packed = np.zeros((rows, -(-columns // 4)), np.uint8)
    for column in range(columns):
        packed[:, column // 4] += ((codes[:, column] + 1) * 4 ** (3 - column % 4)).astype(np.uint8)
    return packed


CODES = (np.arange(3 * 6) % 3 - 1).reshape(3, 6)
TENSORS = {
    "a.codes": pack(CODES),
    "a.inv_scale": np.array([3.0], "f4"),
    "a.bias": np.array([1, 2, 3], "f4"),
    "emb.weight": np.arange(6, dtype="f2").reshape(3, 2),
}
CONFIG = {
    "format": "forge-package/0.9",
    "model": {"family": "unknown", "config": {"x": 1}},
    "layers": {"a": [3, 6]},
}


def make(directory: Path, tensors: dict = TENSORS, config: dict = CONFIG) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "weights.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read_all(directory: Path) -> dict[str, np.ndarray]:
    with open_native_v09(directory, ReadOptions()) as opened:
        found = {name: opened.ternary(name).codes().numpy() for name in opened.ternary_names()}
        return found | {name: opened.plain(name).float().numpy() for name in opened.plain_names()}


def refuse(directory: Path, what: str, *, tensor: str | None = None) -> None:
    with pytest.raises(DamagedCheckpointError, match=what) as caught:
        read_all(directory)
    assert caught.value.exit_code == 8
    if tensor is not None:
        assert caught.value.tensor == tensor


def test_codes_scales_and_values_are_the_makers(tmp_path: Path) -> None:
    with open_native_v09(make(tmp_path), ReadOptions()) as opened:
        assert (opened.format, opened.version) == ("native-0.9", "0.9")
        assert opened.model.config == {"x": 1}
        assert opened.quantization["scale_convention"] == "divide"
        assert opened.infos == {
            "a.weight": TensorInfo("a.weight", "ternary", (3, 6), "i2-columns", 10, (3,)),
            "a.bias": TensorInfo("a.bias", "plain", (3,), "F32", 12),
            "emb.weight": TensorInfo("emb.weight", "plain", (3, 2), "F16", 12),
        }
        ternary = opened.ternary("a.weight")
        assert np.array_equal(ternary.codes().numpy(), CODES)
        expected = (np.float32(1) / np.float32(3)).tobytes()
        assert ternary.scales.numpy().tobytes() == expected
        assert opened.scales("a.weight").numpy().tobytes() == expected
        for name in ("a.bias", "emb.weight"):
            assert opened.plain(name).numpy().tobytes() == TENSORS[name].tobytes()
        assert (opened.tied, opened.extras) == ({}, {})


@settings(max_examples=100)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 130),
    inverse=st.floats(2.0**-100, 2.0**100, width=32),
    seed=st.integers(0, 999),
)
def test_conversion_keeps_codes_and_moves_scales_one_ulp_at_most(
    rows: int, columns: int, inverse: float, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, columns))
    stored = {"l.codes": pack(codes), "l.inv_scale": np.array([inverse], "f4")}
    config = {**CONFIG, "layers": {"l": [rows, columns]}}
    with TemporaryDirectory() as root:
        old = make(Path(root) / "old", stored, config)
        with (
            open_native_v09(old, ReadOptions()) as source,
            staged_directory(Path(root) / "new") as stage,
        ):
            write_native(source, stage, WriteOptions())
        with open_native(Path(root) / "new", ReadOptions()) as result:
            ternary = result.ternary("l.weight")
    assert np.array_equal(ternary.codes().numpy(), codes)
    exact = 1 / float(np.float32(inverse))
    assert abs(float(ternary.scales[0]) - exact) <= np.spacing(np.float32(exact)) / 2


def test_rows_beyond_the_first_chunk_are_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge_harness.formats.tensors.CHUNK_CODES", 6)
    assert np.array_equal(read_all(make(tmp_path))["a.weight"], CODES)
    packed = TENSORS["a.codes"].copy()
    packed[2, 1] |= 0b00_11_00_00
    make(tmp_path, {**TENSORS, "a.codes": packed})
    refuse(tmp_path, r"'a\.weight' holds field 3 at row 2, column 5 \(byte 5 ", tensor="a.weight")


def with_field(row: int, byte: int, bits: int) -> dict[str, np.ndarray]:
    packed = TENSORS["a.codes"].copy()
    packed[row, byte] |= bits
    return {**TENSORS, "a.codes": packed}


def with_scale(*values: float, dtype: str = "f4") -> dict[str, np.ndarray]:
    return {**TENSORS, "a.inv_scale": np.array(values, dtype)}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in TENSORS.items() if key != name}


def plus(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    return {**TENSORS, name: value}


@pytest.mark.parametrize(
    ("stored", "tensor", "what"),
    [
        (with_field(0, 0, 0b11_00_00_00), "a.weight", "field 3 at row 0, column 0 .byte 0 "),
        (with_field(1, 1, 0b00_11_00_00), "a.weight", "field 3 at row 1, column 5 .byte 3 "),
        (with_field(1, 1, 0b00_00_01_00), "a.weight", "field 1 at row 1, column 6 .*expected 0"),
        (with_field(2, 1, 0b00_00_00_11), "a.weight", "field 3 at row 2, column 7 .*expected 0"),
        (without("a.codes"), "a.weight", r"'a\.codes' is missing"),
        (without("a.inv_scale"), "a.weight", r"'a\.inv_scale' is missing"),
        (plus("a.codes", pack(CODES)[:2]), "a.weight", r"'a\.codes' is U8 \[2, 2\]"),
        (plus("a.codes", pack(CODES).astype("i1")), "a.weight", r"'a\.codes' is I8"),
        (with_scale(1, 1), "a.weight", r"'a\.inv_scale' is F32 \[2\]"),
        (with_scale(1, dtype="f2"), "a.weight", r"'a\.inv_scale' is F16"),
        (with_scale(np.nan), "a.weight", r"scale 0 of tensor 'a\.weight' .* is nan"),
        (with_scale(np.inf), "a.weight", r"scale 0 of tensor 'a\.weight' .* is inf"),
        (with_scale(0), "a.weight", r"scale 0 of tensor 'a\.weight' .* is 0\.0"),
        (with_scale(-3), "a.weight", r"scale 0 of tensor 'a\.weight' .* is -3\.0"),
        (with_scale(1e-42), "a.weight", r"'a\.weight' has a scale that fp32 cannot hold"),
        (plus("b.codes", pack(CODES)), "b.codes", "left over"),
        (plus("b.inv_scale", np.ones(1, "f4")), "b.inv_scale", "left over"),
        (plus("a.weight", CODES.astype("f4")), "a.weight", "stored beside its codes"),
        (plus("a.bias", np.array([1, np.nan], "f4")), "a.bias", "holds nan at index 1"),
    ],
)
def test_damaged_tensor_is_named(
    tmp_path: Path, stored: dict[str, np.ndarray], tensor: str, what: str
) -> None:
    refuse(make(tmp_path, stored), what, tensor=tensor)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"layers": []}, "'layers' is"),
        ({"layers": {}}, r"'a\.(codes|inv_scale)' is left over"),
        ({"layers": {"a": [3, 9]}}, r"expected U8 \[3, 3\]"),
        ({"layers": {"a": [3]}}, r"'a' has shape \[3\]"),
        ({"layers": {"a": [3, 0]}}, r"'a' has shape \[3, 0\]"),
        ({"layers": {"a": [3, 6.0]}}, r"'a' has shape"),
        ({"layers": {"a": [3, 6], "b": [1, 1]}}, r"'b\.codes' is missing"),
        ({"model": {"family": "unknown"}}, "'model' is"),
        ({"more": 1}, "key 'more'"),
    ],
)
def test_configuration_that_is_not_the_files_is_refused(
    tmp_path: Path, change: dict, what: str
) -> None:
    refuse(make(tmp_path, config={**CONFIG, **change}), what)


@pytest.mark.parametrize("key", ["model", "layers"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    make(tmp_path, config={k: v for k, v in CONFIG.items() if k != key})
    refuse(tmp_path, f"key '{key}'")


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    raw = (tmp_path / "config.json").read_text().replace("{", '{"layers": {}, ', 1)
    (tmp_path / "config.json").write_text(raw)
    refuse(tmp_path, "key 'layers' is there twice")


# Versions and recognition


@pytest.mark.parametrize(
    ("stated", "version"),
    [("forge-package/0.9", "0.9"), ("forge-package/0.10", "0.10"), ("forge-package/1", "1")],
)
def test_recognition(tmp_path: Path, stated: str, version: str) -> None:
    found = recognise(make(tmp_path, config={**CONFIG, "format": stated}))
    assert found is not None
    assert (found.format, found.version) == ("native-0.9", version)
    assert stated in found.reasons[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "bitnet"}', '{"format": 9}'])
def test_other_configurations_are_left_to_others(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert recognise(tmp_path) is None
    assert recognise(tmp_path / "config.json") is None
    assert recognise(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("version", "what", "code"),
    [
        ("1.1", "version 1.1, this release reads up to 1.0; upgrade", 4),
        ("0.10", "version 0.10 is none", 4),
        ("0.8", "version 0.8 is none", 4),
        ("1.0", "version 1.0 is none", 4),
        ("10.0", "version 10.0, this release reads up to 1.0; upgrade", 4),
        ("1", "version '1' is not of the form", 8),
        ("0.9.1", "is not of the form", 8),
        ("", "is not of the form", 8),
    ],
)
def test_other_versions_are_refused(tmp_path: Path, version: str, what: str, code: int) -> None:
    make(tmp_path, config={**CONFIG, "format": f"forge-package/{version}"})
    with pytest.raises(CheckpointError, match=what) as caught:
        read_all(tmp_path)
    assert caught.value.exit_code == code


# Damage in transit


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    raw = (make(tmp_path) / name).read_bytes()
    for length in {0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1, *range(0, len(raw), 29)}:
        (tmp_path / name).write_bytes(raw[:length])
        refuse(tmp_path, name.replace(".", r"\."))
    (tmp_path / name).unlink()
    refuse(tmp_path, name.replace(".", r"\."))


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(where=st.integers(0, 2**30))
def test_flipped_bit_of_the_weights_is_refused_or_stays_in_its_tensor(
    tmp_path: Path, where: int
) -> None:
    """0.9 has no digests: a flip of data is refused or changes values of one tensor only."""
    before = read_all(make(tmp_path))
    raw = bytearray((tmp_path / "weights.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    bit = where % (8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    (tmp_path / "weights.safetensors").write_bytes(raw)
    try:
        after = read_all(tmp_path)
    except DamagedCheckpointError:
        return
    if bit // 8 >= header:
        assert sum(not np.array_equal(before[name], after[name]) for name in before) <= 1


# Tied tensors

LM = ByteLMConfig(vocabulary=9, width=8, heads=2, hidden=4, layers=1)


def byte_lm(**changes: np.ndarray | None) -> tuple[dict, dict]:
    model = ByteLM(LM)
    stored: dict[str, np.ndarray] = {}
    layers = {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in model.quantized_names():
            layers[module] = list(value.shape)
            stored[f"{module}.codes"] = pack(np.sign(value.numpy()).astype(int))
            stored[f"{module}.inv_scale"] = np.array([2.0], "f4")
        else:
            stored[name] = value.numpy().copy()
    stored |= {k.replace("__", "."): v for k, v in changes.items() if v is not None}
    for key, value in changes.items():
        if value is None:
            del stored[key.replace("__", ".")]
    model_config = {"family": "byte-lm", "config": asdict(LM)}
    return stored, {**CONFIG, "model": model_config, "layers": layers}


def test_tensors_stored_twice_become_tied(tmp_path: Path) -> None:
    stored, config = byte_lm()
    make(tmp_path, stored, config)
    with open_native_v09(tmp_path, ReadOptions()) as opened:
        assert opened.tied == {"head.weight": "embedding.weight"}
        assert "head.weight" not in opened.infos
        assert torch.equal(
            opened.plain("embedding.weight"), torch.from_numpy(stored["head.weight"])
        )


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_head_that_drifted_from_its_embedding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("forge_harness.formats.tensors.CHUNK_CODES", chunk)
    stored, config = byte_lm()
    stored["head.weight"] = stored["embedding.weight"].copy()
    stored["head.weight"][7, 3] += 1
    make(tmp_path, stored, config)
    refuse(
        tmp_path,
        r"'head\.weight' differs from 'embedding\.weight', to which it is tied, in row 7",
        tensor="head.weight",
    )


def test_sign_of_zero_is_a_difference(tmp_path: Path) -> None:
    stored, config = byte_lm()
    stored["embedding.weight"][0, 0] = 0.0
    stored["head.weight"] = stored["embedding.weight"].copy()
    make(tmp_path, stored, config)
    read_all(tmp_path)
    stored["head.weight"][0, 0] = -0.0
    make(tmp_path, stored, config)
    refuse(tmp_path, "in row 0", tensor="head.weight")


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (None, r"'head\.weight' is missing"),
        (np.zeros((9, 8), "f2"), "in dtype or shape"),
        (np.zeros((8, 9), "f4"), "in dtype or shape"),
    ],
)
def test_tied_tensor_must_be_there_twice(
    tmp_path: Path, head: np.ndarray | None, what: str
) -> None:
    make(tmp_path, *byte_lm(head__weight=head))
    refuse(tmp_path, what, tensor="head.weight")


def test_embedding_must_be_there(tmp_path: Path) -> None:
    make(tmp_path, *byte_lm(embedding__weight=None))
    refuse(tmp_path, "is missing", tensor="embedding.weight")


def test_equal_tensors_of_an_unknown_model_are_not_tied(tmp_path: Path) -> None:
    same = np.ones((2, 2), "f4")
    stored = {**TENSORS, "head.weight": same, "embedding.weight": same}
    with open_native_v09(make(tmp_path, stored), ReadOptions()) as opened:
        assert opened.tied == {}
        assert {"head.weight", "embedding.weight"} <= opened.infos.keys()


@pytest.mark.parametrize("tie", [True, False])
def test_hugging_face_head_is_tied_where_the_configuration_says_so(
    tmp_path: Path, tie: bool
) -> None:
    source = hf_checkpoint(tie_word_embeddings=tie)
    stored, layers = {}, {}
    for name, value in source.coded.items():
        module = name.removesuffix(".weight")
        layers[module] = list(value.shape)
        stored[f"{module}.codes"] = pack(value.codes().numpy().astype(int))
        stored[f"{module}.inv_scale"] = np.array([2.0], "f4")
    stored |= {name: value.numpy() for name, value in source.others.items()}
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"].copy())
    model = {"family": "bitnet", "config": {**HF_CONFIG, "tie_word_embeddings": tie}}
    make(tmp_path, stored, {**CONFIG, "model": model, "layers": layers})
    with open_native_v09(tmp_path, ReadOptions()) as opened:
        assert ("lm_head.weight" in opened.tied) == tie
        assert ("lm_head.weight" in opened.infos) != tie
