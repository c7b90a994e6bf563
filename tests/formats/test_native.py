"""The native package: files by safetensors, json and numpy, written, read and recognised."""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from forge_harness.errors import CheckpointError
from forge_harness.formats import ReadOptions, TensorInfo, TernaryTensor
from forge_harness.formats.native import open_native, recognise
from forge_harness.formats.native_common import parse_version
from forge_harness.model import DigitsConfig

from .memory import HF_CONFIG, MemoryCheckpoint, hf_checkpoint, memory_checkpoint, random_ternary
from .native_maker import (
    CODES,
    CONFIG,
    TENSORS,
    make,
    pack,
    read_all,
    refuse,
    unpack,
    vouch,
    written,
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path)


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
