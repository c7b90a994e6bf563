"""The native package: each kind of damage by name, in transit or vouched for."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .native_maker import (
    CODES,
    CONFIG,
    TENSORS,
    make,
    pack,
    read_all,
    refuse,
    vouch,
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path)


# Damage that the manifest vouches for


def edited(**changes: object) -> dict:
    return {**CONFIG, **changes}


def without(key: str) -> dict:
    return {k: v for k, v in CONFIG.items() if k != key}


def quantization(**changes: object) -> dict:
    return edited(quantization={**CONFIG["quantization"], **changes})


def quantized(**changes: object) -> dict:
    entries = {**CONFIG["quantized"]}
    entries["a.weight"] = {**entries["a.weight"], **changes}
    return edited(quantized=entries)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        *[(without(key), f"'?{key}") for key in CONFIG],
        (edited(more=1), "key 'more'"),
        (edited(format="other"), "format is 'other'"),
        (quantization(packing="i2-columns"), "packing is 'i2-columns'"),
        (quantization(scale_convention="divide"), "scale_convention is 'divide'"),
        (quantization(compute="int8"), "compute is 'int8'"),
        (quantization(compute=["exact"]), "compute is"),
        (quantization(bits=2), "'quantization' has"),
        (edited(quantization={"packing": "i2-rowblock"}), "'quantization' has"),
        (edited(quantization=[]), "'quantization' is"),
        (edited(model={"family": "unknown"}), "'model' is"),
        (edited(model={"family": 1, "config": {}}), "'model' must"),
        (edited(model={"family": "x", "config": []}), "'model' must"),
        (edited(quantized=[]), "'quantized' is"),
        (edited(tied=[]), "'tied' is"),
        (edited(extras=None), "'extras' is"),
        (edited(quantized={}), r"'a\.weight' has scales and is not in 'quantized'"),
        (edited(tied={"head.weight": "gone"}), r"'head\.weight' is tied to 'gone'"),
        (edited(tied={"emb.weight": "half"}), r"'emb\.weight' is tied .* stored as well"),
        (edited(tied={"x": "y", "y": "half"}), "'x' is tied to 'y'"),
        (edited(tied={"x": 3}), "'x' is tied to 3"),
        (edited(tied={"x": "a.weight_scale"}), "'x' is tied"),
        (quantized(shape=[8, 5]), r"'a\.weight' has parts"),
        (quantized(shape=[7, 6]), r"'a\.weight' is U8 \[2, 5\]; expected U8 \[2, 6\]"),
        (quantized(shape=[9, 5], parts=[5, 4]), r"'a\.weight' is U8 \[2, 5\]; expected U8 \[3, 5"),
        (quantized(shape=[7]), r"'a\.weight' has shape \[7\]"),
        (quantized(shape=[7, 5, 1]), r"'a\.weight' has shape"),
        (quantized(shape=[7, "5"]), r"'a\.weight' has shape"),
        (quantized(shape=[True, 5]), r"'a\.weight' has shape"),
        (quantized(parts=[7]), r"'a\.weight_scale' is F32 \[2\]; expected F32 \[1\]"),
        (quantized(parts=[3, 5]), r"'a\.weight' has parts \[3, 5\]"),
        (quantized(parts=[7, 0]), r"'a\.weight' has parts \[7, 0\]"),
        (quantized(parts=[8, -1]), r"'a\.weight' has parts \[8, -1\]"),
        (quantized(parts=[]), r"'a\.weight' has parts"),
        (quantized(parts=7), r"'a\.weight' has parts"),
        (quantized(bits=2), r"for 'a\.weight'; expected shape and parts"),
        (edited(quantized={**CONFIG["quantized"], "half": {}}), "'half'; expected a name"),
        (
            edited(quantized={**CONFIG["quantized"], "c.weight": {"shape": [1, 1], "parts": [1]}}),
            r"tensor 'c\.weight' is missing",
        ),
    ],
)
def test_configuration_that_is_not_the_files_is_refused(
    tmp_path: Path, config: dict, what: str
) -> None:
    refuse(make(tmp_path, config=config), what)


def test_key_given_twice_is_refused(package: Path) -> None:
    raw = (package / "forge.json").read_text().replace("{", '{"tied": {}, ', 1)
    (package / "forge.json").write_text(raw)
    vouch(package)
    refuse(package, r"forge\.json.*key 'tied' is there twice")


def tensors(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    new = {**TENSORS, **{k.replace("__", "."): v for k, v in changes.items()}}
    return {k: v for k, v in new.items() if v is not None}


def field(row: int, column: int, value: int) -> np.ndarray:
    packed = TENSORS["a.weight"].copy()
    shift = 2 * (row // 2)
    packed[row % 2, column] = packed[row % 2, column] & ~np.uint8(3 << shift) | value << shift
    return packed


SCALE_2 = TENSORS["a.weight_scale"]


@pytest.mark.parametrize(
    ("stored", "tensor", "what"),
    [
        (tensors(a__weight=None), "a.weight", "is missing"),
        (tensors(a__weight_scale=None), "a.weight", r"'a\.weight_scale' is missing"),
        (tensors(a__weight=TENSORS["a.weight"].astype("i1")), "a.weight", "is I8"),
        (tensors(a__weight=TENSORS["a.weight"].T.copy()), "a.weight", r"is U8 \[5, 2\]"),
        (tensors(a__weight=CODES.astype("f4")), "a.weight", r"is F32 \[7, 5\]"),
        (tensors(a__weight_scale=SCALE_2.astype("f2")), "a.weight", "is F16"),
        (tensors(a__weight_scale=SCALE_2[:1]), "a.weight", r"is F32 \[1\]"),
        (tensors(a__weight_scale=SCALE_2.reshape(2, 1)), "a.weight", r"is F32 \[2, 1\]"),
        (tensors(a__weight_scale=np.array([1, np.nan], "f4")), "a.weight", "scale 1 .* is nan"),
        (tensors(a__weight_scale=np.array([np.inf, 1], "f4")), "a.weight", "scale 0 .* is inf"),
        (tensors(a__weight_scale=np.array([1, 0], "f4")), "a.weight", r"scale 1 .* is 0\.0"),
        (tensors(a__weight_scale=np.array([-1, 1], "f4")), "a.weight", r"scale 0 .* is -1\.0"),
        (tensors(a__weight=field(0, 0, 3)), "a.weight", "code 3 at row 0, column 0 .*byte 0 "),
        (tensors(a__weight=field(6, 4, 3)), "a.weight", "code 3 at row 6, column 4 .*byte 4 "),
        (tensors(a__weight=field(3, 2, 3)), "a.weight", "code 3 at row 3, column 2 .*byte 7 "),
        (tensors(a__weight=field(7, 1, 3)), "a.weight", "code 3 at row 7"),
        (tensors(a__weight=field(7, 1, 0)), "a.weight", "padding at row 7, column 1 holds field 0"),
        (tensors(a__weight=field(7, 4, 2)), "a.weight", "padding at row 7, column 4 holds field 2"),
        (tensors(emb__weight=None), "head.weight", r"'emb\.weight', which is not stored"),
        (
            tensors(emb__weight=np.array([[1, 2], [3, np.nan]], "f4")),
            "emb.weight",
            "holds nan at index 3",
        ),
        (tensors(half=np.array([-np.inf, 1], "f2")), "half", "holds -inf at index 0"),
        (tensors(c__weight=pack(CODES), c__weight_scale=SCALE_2), "c.weight", "not in 'quantized'"),
    ],
)
def test_damaged_tensor_is_named(
    tmp_path: Path, stored: dict[str, np.ndarray], tensor: str, what: str
) -> None:
    refuse(make(tmp_path, tensors=stored), what, tensor=tensor)


def test_nan_beyond_the_first_chunk_is_found(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge_harness.formats.tensors.CHUNK_CODES", 2)
    read_all(package)
    changed = np.array([[0, 1], [2, 3], [4, np.inf]], "f4")
    make(package, tensors=tensors(emb__weight=changed))
    refuse(package, "holds inf at index 5", tensor="emb.weight")


# Damage in transit


FILES = ("forge.json", "manifest.json", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_named(package: Path, name: str) -> None:
    raw = (package / name).read_bytes()
    for length in {0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1, *range(0, len(raw), 29)}:
        (package / name).write_bytes(raw[:length])
        refuse(package, name.replace(".", r"\."))


def sections(raw: bytes) -> dict[str, int]:
    """Name -> a length that ends inside that section of a safetensors file."""
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8:header])
    entries.pop("__metadata__")
    found = {"the 8 of the header length": 5, "give a header of": header // 2}
    ends = {name: header + e["data_offsets"][1] - 1 for name, e in entries.items()}
    return found | {f"tensor {name!r} ends at byte": end for name, end in ends.items()}


def test_truncation_the_manifest_vouches_for_names_header_or_tensor(package: Path) -> None:
    raw = (package / "model.safetensors").read_bytes()
    found = sections(raw)
    assert len(found) == 2 + len(TENSORS)
    for what, length in found.items():
        (package / "model.safetensors").write_bytes(raw[:length])
        vouch(package)
        refuse(package, what)
    (package / "model.safetensors").write_bytes(raw + b"\0")
    vouch(package)
    refuse(package, "1 bytes follow the last tensor")


@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from(FILES), where=st.integers(0, 2**30))
def test_any_flipped_bit_is_noticed(package: Path, name: str, where: int) -> None:
    whole = (package / name).read_bytes()
    damaged = bytearray(whole)
    bit = where % (8 * len(whole))
    damaged[bit // 8] ^= 1 << bit % 8
    (package / name).write_bytes(damaged)
    try:
        refuse(package, name.replace(".", r"\."))
    finally:
        (package / name).write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    refuse(package, name.replace(".", r"\."))
    if name != "manifest.json":
        vouch(package)
        refuse(package, f"does not list '{name}'")


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors", "sub/forge.json"])
def test_extra_file_is_named(package: Path, name: str) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(b"{}")
    refuse(package, f"'{name}' is there, and")
