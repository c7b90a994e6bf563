"""The native package: files by safetensors, json and numpy; each kind of damage by name."""

from __future__ import annotations

import hashlib
import json
import struct
import weakref
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from forge_harness.durable import staged_directory
from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions, TensorInfo, TernaryTensor, WriteOptions
from forge_harness.formats.native import open_native, recognise, write_native
from forge_harness.formats.native_common import parse_version
from forge_harness.model import ByteLM, ByteLMConfig, DigitsConfig, DigitsModel

from .memory import HF_CONFIG, MemoryCheckpoint, hf_checkpoint, memory_checkpoint, random_ternary

# A maker of packages from docs/formats.md, and a reader of them: numpy, json and hashlib only.


def pack(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    quarter = -(-rows // 4)
    packed = np.zeros((quarter, columns), np.uint8)
    for row in range(4 * quarter):
        field = codes[row] + 1 if row < rows else np.ones(columns, int)
        packed[row % quarter] += (field * 4 ** (row // quarter)).astype(np.uint8)
    return packed


def unpack(packed: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the fields of the rows beyond the last."""
    fields = np.concatenate([packed // 4**i % 4 for i in range(4)]).astype(int)
    return fields[:rows] - 1, fields[rows:]


def vouch(directory: Path) -> None:
    """Writes the manifest of what is there."""
    files = []
    for path in sorted(
        p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json"
    ):
        raw = path.read_bytes()
        name = path.relative_to(directory).as_posix()
        files.append({"path": name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    content = {"schema": "forge-manifest/1", "files": files}
    (directory / "manifest.json").write_text(json.dumps(content))


CODES = (np.arange(7 * 5) % 3 - 1).reshape(7, 5)
TENSORS = {
    "a.weight": pack(CODES),
    "a.weight_scale": np.array([0.5, 0.3], "f4"),
    "b.weight": pack(-CODES[:4]),
    "b.weight_scale": np.array([1e-3], "f4"),
    "emb.weight": np.arange(6, dtype="f4").reshape(3, 2),
    "half": np.array([1.5, -2], "f2"),
    "count": np.array(7, "i8"),
}
CONFIG = {
    "format": "forge-package",
    "version": "1.0",
    "model": {"family": "unknown", "config": {"x": [1, {"y": None}]}},
    "quantization": {"packing": "i2-rowblock", "scale_convention": "multiply", "compute": "fake"},
    "quantized": {
        "a.weight": {"shape": [7, 5], "parts": [3, 4]},
        "b.weight": {"shape": [4, 5], "parts": [4]},
    },
    "tied": {"head.weight": "emb.weight"},
    "extras": {"step": 3},
}


def make(directory: Path, tensors: dict = TENSORS, config: dict = CONFIG) -> Path:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "forge.json").write_text(json.dumps(config))
    vouch(directory)
    return directory


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path)


def read_all(directory: Path) -> dict[str, np.ndarray]:
    with open_native(directory, ReadOptions()) as opened:
        found = {name: opened.ternary(name).codes().numpy() for name in opened.ternary_names()}
        return found | {name: opened.plain(name).float().numpy() for name in opened.plain_names()}


def refuse(directory: Path, what: str, *, tensor: str | None = None) -> None:
    with pytest.raises(DamagedCheckpointError, match=what) as caught:
        read_all(directory)
    assert caught.value.exit_code == 8
    if tensor is not None:
        assert caught.value.tensor == tensor
        assert f"'{tensor}" in str(caught.value)


def written(source: MemoryCheckpoint, directory: Path, **options: object) -> Path:
    with staged_directory(directory, replace=True) as stage:
        assert write_native(source, stage, WriteOptions(), **options) == []  # type: ignore[arg-type]
    return directory


# Reading


def test_codes_scales_and_values_are_the_makers(package: Path) -> None:
    with open_native(package, ReadOptions()) as opened:
        assert opened.format == "native"
        assert opened.version == "1.0"
        assert opened.model.family == "unknown"
        assert opened.model.config == CONFIG["model"]["config"]
        assert opened.quantization == CONFIG["quantization"]
        assert opened.tied == {"head.weight": "emb.weight"}
        assert opened.extras == {"step": 3}
        assert set(opened.infos) == {"a.weight", "b.weight", "emb.weight", "half", "count"}
        assert opened.infos["a.weight"] == TensorInfo(
            "a.weight", "ternary", (7, 5), "i2-rowblock", 18, (3, 4)
        )
        assert opened.infos["half"] == TensorInfo("half", "plain", (2,), "F16", 4)
        first = opened.ternary("a.weight")
        assert np.array_equal(first.codes().numpy(), CODES)
        assert first.scales.numpy().tobytes() == TENSORS["a.weight_scale"].tobytes()
        assert torch.equal(opened.scales("a.weight"), first.scales)
        assert first.parts == (3, 4)
        assert np.array_equal(opened.ternary("b.weight").codes().numpy(), -CODES[:4])
        for name in ("emb.weight", "half", "count"):
            assert opened.plain(name).numpy().tobytes() == TENSORS[name].tobytes()
            assert opened.plain(name).shape == TENSORS[name].shape
        sizes = {p.name: p.stat().st_size for p in package.iterdir() if p.name != "manifest.json"}
        assert {entry.path: entry.bytes for entry in opened.manifest.files} == sizes


def test_further_files_that_are_listed_belong_to_the_package(package: Path) -> None:
    (package / "labels").mkdir()
    (package / "labels/map.json").write_text("{}")
    refuse(package, r"'labels/map\.json' is there, and")
    vouch(package)
    read_all(package)


# Writing


SCALES = st.floats(2.0**-100, 2.0**100, width=32)


@st.composite
def sources(draw: st.DrawFn) -> MemoryCheckpoint:
    coded = {}
    for index in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(1, 130)), draw(st.integers(1, 130))
        cuts = draw(st.sets(st.integers(1, rows - 1), max_size=3)) if rows > 1 else set()
        edges = [0, *sorted(cuts), rows]
        parts = tuple(end - start for start, end in pairwise(edges))
        scales = draw(
            st.lists(
                st.floats(2.0**-100, 2.0**100, width=32), min_size=len(parts), max_size=len(parts)
            )
        )
        seed = draw(st.integers(0, 99))
        coded[f"l{index}.weight"] = random_ternary(
            rows, columns, scales=tuple(scales), parts=parts, seed=seed
        )
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]))
    others = {"plain": torch.rand(shape).mul(200).to(dtype), "l0.bias": torch.rand(3)}
    return memory_checkpoint(coded, others)


@settings(max_examples=60)
@given(source=sources())
def test_files_hold_what_was_given(source: MemoryCheckpoint) -> None:
    with TemporaryDirectory() as root:
        directory = written(source, Path(root) / "package")
        config = json.loads((directory / "forge.json").read_bytes())
        with safe_open(directory / "model.safetensors", "pt") as stream:
            stored = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            assert stream.metadata() == {"format": "pt"}
        scales = {f"{name}_scale" for name in source.coded}
        assert set(stored) == {*source.coded, *scales, *source.others}
        for name, given_ in source.coded.items():
            rows, columns = given_.shape
            entry = {"shape": [rows, columns], "parts": list(given_.parts)}
            assert config["quantized"][name] == entry
            codes, padding = unpack(stored[name].numpy(), rows)
            assert np.array_equal(codes, given_.codes().numpy())
            assert (padding == 1).all()
            assert np.array_equal(stored[name].numpy(), pack(codes))
            kept = stored[f"{name}_scale"]
            assert kept.dtype is torch.float32
            assert kept.numpy().tobytes() == given_.scales.numpy().tobytes()
        for name, tensor in source.others.items():
            assert stored[name].dtype is tensor.dtype
            assert torch.equal(stored[name], tensor)
        with open_native(directory, ReadOptions()) as opened:
            for name, given_ in source.coded.items():
                found = opened.ternary(name)
                assert torch.equal(found.packed, given_.packed)
                assert torch.equal(found.scales, given_.scales)
                assert (found.parts, found.rows) == (given_.parts, given_.rows)


def small(**changes: object) -> MemoryCheckpoint:
    coded = {"a.weight": random_ternary(6, 3, scales=(0.5, 0.25), parts=(2, 4))}
    return memory_checkpoint(coded, {"emb.weight": torch.rand(3, 2)}, **changes)  # type: ignore[arg-type]


def test_configuration_is_canonical_and_says_everything(tmp_path: Path) -> None:
    source = small(
        family="mystery", config={"b": 1, "a": [0.5]}, tied={"x": "emb.weight"}, extras={"step": 9}
    )
    raw = (written(source, tmp_path / "p") / "forge.json").read_bytes()
    config = json.loads(raw)
    assert raw == json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    assert config == {
        "format": "forge-package",
        "version": "1.0",
        "model": {"family": "mystery", "config": {"a": [0.5], "b": 1}},
        "quantization": {
            "packing": "i2-rowblock",
            "scale_convention": "multiply",
            "compute": "exact",
        },
        "quantized": {"a.weight": {"shape": [6, 3], "parts": [2, 4]}},
        "tied": {"x": "emb.weight"},
        "extras": {"step": 9},
    }


def test_extras_and_compute_are_the_callers_where_given(tmp_path: Path) -> None:
    source = small(extras={"step": 9})
    config = json.loads(
        (written(source, tmp_path / "p", extras={}, compute="fake") / "forge.json").read_bytes()
    )
    assert config["extras"] == {}
    assert config["quantization"]["compute"] == "fake"


def test_compute_of_the_source_is_kept(package: Path, tmp_path: Path) -> None:
    with open_native(package, ReadOptions()) as source:
        again = written(source, tmp_path / "again")  # type: ignore[arg-type]
    for name in ("model.safetensors", "forge.json"):
        assert (again / name).exists()
    assert json.loads((again / "forge.json").read_bytes()) == CONFIG
    one, two = load_file(package / "model.safetensors"), load_file(again / "model.safetensors")
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}


def test_hugging_face_names_and_configuration_are_kept(tmp_path: Path) -> None:
    source = hf_checkpoint()
    directory = written(source, tmp_path / "p")
    config = json.loads((directory / "forge.json").read_bytes())
    assert config["model"] == {"family": "bitnet", "config": HF_CONFIG}
    names = set(load_file(directory / "model.safetensors"))
    assert {name.removesuffix("_scale") for name in names} == set(source.infos)
    assert "model.layers.0.self_attn.q_proj.weight_scale" in names
    read_all(directory)


def test_packed_bytes_are_copied_and_rows_beyond_the_last_are_code_zero(tmp_path: Path) -> None:
    packed = torch.from_numpy(pack(CODES))
    packed[1] &= 0x3F  # Row 7 of 7: the field transformers writes there is 0.
    kept = packed.clone()
    source = memory_checkpoint({"a.weight": TernaryTensor(packed, 7, torch.ones(1), (7,))}, {})
    stored = load_file(written(source, tmp_path / "p") / "model.safetensors")
    assert np.array_equal(stored["a.weight"], pack(CODES))
    assert torch.equal(packed, kept)


def test_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = small(extras={"k": 1})
    one, two = (written(source, tmp_path / name) for name in ("one", "two"))
    for name in ("forge.json", "manifest.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_second_write_leaves_no_stale_manifest(tmp_path: Path) -> None:
    directory = written(small(), tmp_path / "p")
    first = (directory / "manifest.json").read_bytes()
    other = memory_checkpoint({"a.weight": random_ternary(6, 3, scales=(0.5,), seed=4)}, {})
    written(other, directory)
    read_all(directory)
    (directory / "manifest.json").write_bytes(first)
    refuse(directory, r"'(forge\.json|model\.safetensors)'.*manifest\.json says")


class OneAtATime(MemoryCheckpoint):
    """Makes each tensor when asked, and fails when an earlier one is still held."""

    alive: list

    def _hand_out(self, tensor: torch.Tensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in self.alive)
        self.alive.append(weakref.ref(tensor))
        return tensor

    def ternary(self, name: str) -> TernaryTensor:
        own = self.coded[name]
        return TernaryTensor(self._hand_out(own.packed.clone()), own.rows, own.scales, own.parts)

    def plain(self, name: str) -> torch.Tensor:
        return self._hand_out(self.others[name].clone())


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    coded = {f"l{i}.weight": random_ternary(9, 5, seed=i) for i in range(3)}
    plain = memory_checkpoint(coded, {"x": torch.rand(4), "y": torch.rand(4)})
    source = OneAtATime(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    source.alive = []
    written(source, tmp_path / "p")
    assert len(source.alive) >= 5
    assert set(read_all(tmp_path / "p")) == {*coded, "x", "y"}


def changed(name: str, value: object) -> MemoryCheckpoint:
    source = small()
    if isinstance(value, TernaryTensor):
        infos = TensorInfo(name, "ternary", value.shape, "i2-rowblock", 0, value.parts)
        source.coded[name] = value
    else:
        assert isinstance(value, torch.Tensor)
        infos = TensorInfo(name, "plain", tuple(value.shape), "F32", 0)
        source.others[name] = value
    source.infos = {**source.infos, name: infos}
    return source


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (small(tied={"x": "gone"}), "'x' is tied to 'gone', which is not stored"),
        (small(tied={"a.weight": "emb.weight"}), r"'a\.weight' is tied .* and stored as well"),
        (small(extras={"x": float("nan")}), r"cannot be written to forge\.json"),
        (small(extras={"x": {1, 2}}), r"cannot be written to forge\.json"),
        (small(extras={"x": 2**60}), r"cannot be written to forge\.json"),
        (changed("a.weight_scale", torch.rand(2)), r"'a\.weight_scale' has a name"),
        (changed("c.weight_scale", torch.rand(2)), r"'c\.weight_scale' has a name"),
        (changed("codes", random_ternary(2, 2)), r"'codes' does not end in \.weight"),
        (changed("c", torch.tensor([0.0, float("inf")])), "'c' holds inf at index 1"),
        (changed("c", torch.tensor([float("nan")])), "'c' holds nan at index 0"),
        (changed("c.weight", random_ternary(2, 2, scales=(0.0,))), r"scale 0\.0 .*'c\.weight'"),
        (changed("c.weight", random_ternary(2, 2, scales=(-1.0,))), r"scale -1\.0 .*'c\.weight'"),
        (
            changed("c.weight", random_ternary(2, 2, scales=(1.0, float("nan")), parts=(1, 1))),
            r"scale nan .*'c\.weight'",
        ),
        (small(family="digits", config={}), "lacks or has a wrong 'inputs'"),
        (small(family="digits", config=asdict(DigitsConfig())), "'stem.weight' is missing"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, source: MemoryCheckpoint, what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        written(source, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_unknown_arithmetic_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compute 'int4'"):
        written(small(), tmp_path / "p", compute="int4")


# Recognition and versions


def test_recognition(package: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = recognise(package)
    assert found is not None
    assert (found.format, found.version) == ("native", "1.0")
    assert "forge.json" in found.reasons[0]
    assert recognise(package / "forge.json") is None
    assert recognise(package / "none") is None
    (package / "forge.json").write_text("{")
    assert "cannot be read" in recognise(package).reasons[0]  # type: ignore[union-attr]
    (package / "forge.json").unlink()
    assert recognise(package).format == "native"  # type: ignore[union-attr]
    refuse(package, r"lists 'forge\.json', and it is missing")
    other = tmp_path_factory.mktemp("other")
    (other / "model.safetensors").write_bytes(b"")
    assert recognise(other) is None
    vouch(other)
    assert recognise(other) is None


@pytest.mark.parametrize("version", ["1.1", "1.10", "2.0", "10.0", "1.100"])
def test_newer_version_is_refused_with_the_remedy(tmp_path: Path, version: str) -> None:
    make(tmp_path, config={**CONFIG, "version": version, "new": 1})
    what = f"version {version}, this release reads up to 1.0; upgrade"
    with pytest.raises(CheckpointError, match=what) as caught:
        read_all(tmp_path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("version", ["0.9", "0.10", "0.100", "0.0"])
def test_older_version_is_not_taken_for_a_newer_one(tmp_path: Path, version: str) -> None:
    make(tmp_path, config={**CONFIG, "version": version})
    with pytest.raises(CheckpointError, match=f"version {version} is none") as caught:
        read_all(tmp_path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "version",
    [None, 1.0, 1, "1", "1.", "1.0.0", "v1.0", "01.0", "1.00", " 1.0", "1.0\n", "1.-0", ""],
)
def test_version_that_is_none_is_damage(tmp_path: Path, version: object) -> None:
    make(tmp_path, config={**CONFIG, "version": version})
    refuse(tmp_path, "version .* is not of the form")


@given(one=st.tuples(*[st.integers(0, 200)] * 2), two=st.tuples(*[st.integers(0, 200)] * 2))
def test_versions_order_as_numbers(one: tuple[int, int], two: tuple[int, int]) -> None:
    left, right = (parse_version(f"{major}.{minor}") for major, minor in (one, two))
    assert (left < right) == (one < two)  # type: ignore[operator]


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


# Models whose tensors are known

HF_NAMES = sorted(hf_checkpoint().infos)


def reference(model: torch.nn.Module, family: str) -> MemoryCheckpoint:
    """The state dict of a model, as the model itself names and shapes it."""
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "head.weight"}
    tied = {"head.weight": "embedding.weight"}
    if family == "digits":
        state, tied = dict(model.state_dict()), {}
    ternary = {f"{name}.weight" for name in model.quantized_names()}  # type: ignore[operator]
    coded = {k: random_ternary(*v.shape, scales=(0.1,)) for k, v in state.items() if k in ternary}
    others = {k: v for k, v in state.items() if k not in ternary}
    config = asdict(model.config)  # type: ignore[arg-type]
    return memory_checkpoint(coded, others, family=family, config=config, tied=tied)


@settings(max_examples=20)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    hidden=st.integers(1, 9),
    sub_norm=st.booleans(),
    fused=st.booleans(),
)
def test_every_byte_lm_is_as_its_configuration_says(
    layers: int, heads: int, hidden: int, sub_norm: bool, fused: bool
) -> None:
    config = ByteLMConfig(
        vocabulary=11,
        width=4 * heads,
        layers=layers,
        heads=heads,
        hidden=hidden,
        sub_norm=sub_norm,
        fused_qkv=fused,
    )
    with TemporaryDirectory() as root:
        source = reference(ByteLM(config), "byte-lm")
        assert set(read_all(written(source, Path(root) / "p"))) == set(source.infos)


@settings(max_examples=10)
@given(
    width=st.integers(1, 9), hidden=st.integers(1, 9), blocks=st.integers(0, 3), sub=st.booleans()
)
def test_every_digits_model_is_as_its_configuration_says(
    width: int, hidden: int, blocks: int, sub: bool
) -> None:
    config = DigitsConfig(inputs=5, width=width, hidden=hidden, blocks=blocks, sub_norm=sub)
    with TemporaryDirectory() as root:
        source = reference(DigitsModel(config), "digits")
        assert set(read_all(written(source, Path(root) / "p"))) == set(source.infos)


def source_of(family: str) -> MemoryCheckpoint:
    if family == "bitnet":
        return hf_checkpoint()
    if family == "digits":
        return reference(DigitsModel(DigitsConfig(width=8, hidden=4)), family)
    return reference(ByteLM(ByteLMConfig(width=8, heads=2, hidden=4, sub_norm=True)), family)


def rewrite(
    directory: Path,
    change: Callable[[dict[str, torch.Tensor], dict], object],
) -> None:
    """Changes tensors and forge.json together, and vouches for the result."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    stored = load(directory / "model.safetensors")
    config = json.loads((directory / "forge.json").read_bytes())
    change(stored, config)
    save(stored, directory / "model.safetensors")
    (directory / "forge.json").write_text(json.dumps(config))
    vouch(directory)


def drop(name: str) -> Callable[[dict[str, torch.Tensor], dict], object]:
    def change(stored: dict[str, torch.Tensor], config: dict) -> None:
        stored.pop(name)
        stored.pop(f"{name}_scale", None)
        config["quantized"].pop(name, None)

    return change


@pytest.mark.parametrize("family", ["bitnet", "byte-lm", "digits"])
def test_any_missing_or_wrong_tensor_of_a_known_model_is_named(tmp_path: Path, family: str) -> None:
    source = source_of(family)
    for name in source.infos:
        directory = written(source, tmp_path / "p")
        rewrite(directory, drop(name))
        if name in source.tied.values():
            refuse(directory, f"tied to '{name}', which is not stored")
        else:
            refuse(directory, f"'{name}' is missing", tensor=name)
        if name in source.others:
            written(source, directory)
            longer = torch.zeros(*source.others[name].shape, 1)
            rewrite(directory, lambda stored, _: stored.update({name: longer}))  # noqa: B023
            with pytest.raises(DamagedCheckpointError, match=r"has shape"):
                read_all(directory)


@pytest.mark.parametrize("family", ["bitnet", "byte-lm", "digits"])
def test_left_over_tensor_of_a_known_model_is_named(tmp_path: Path, family: str) -> None:
    directory = written(source_of(family), tmp_path / "p")
    rewrite(directory, lambda stored, _: stored.update({"extra.weight": torch.ones(2, 2)}))
    refuse(directory, "is left over", tensor="extra.weight")


def test_tied_head_of_a_byte_lm_must_be_there(tmp_path: Path) -> None:
    directory = written(source_of("byte-lm"), tmp_path / "p")
    rewrite(directory, lambda _, config: config["tied"].clear())
    refuse(directory, "is missing", tensor="head.weight")


@pytest.mark.parametrize(
    ("config", "what"),
    [({"layers": 10**12}, "layers 1000000000000, and only"), ({"width": "8"}, "wrong")],
)
def test_configuration_that_no_model_has_is_refused(
    tmp_path: Path, config: dict, what: str
) -> None:
    directory = written(source_of("byte-lm"), tmp_path / "p")
    rewrite(directory, lambda _, c: c["model"]["config"].update(config))
    with pytest.raises(CheckpointError, match=what):
        read_all(directory)
