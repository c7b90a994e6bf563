"""Damaged checkpoints: each refused with the tensor, key or file at fault, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.paths import fixtures_dir

ROOT = fixtures_dir() / "checkpoints"
PACKED = "hf-packed-autobitlinear-tied"
Q = "model.layers.0.self_attn.q_proj.weight"


def read_all(path):
    with open_checkpoint(path) as opened:
        for name in opened.ternary_names():
            opened.ternary(name)
        for name in opened.plain_names():
            opened.plain(name)


class Weights:
    """A safetensors file taken apart: header and data."""

    def __init__(self, path):
        self.path = path
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        self.header = json.loads(raw[8 : 8 + length])
        self.data = bytearray(raw[8 + length :])

    def write(self, header=None, *, length=None):
        raw = (header or json.dumps(self.header)).encode()
        size = len(raw) if length is None else length
        self.path.write_bytes(struct.pack("<Q", size) + raw + self.data)

    def start(self, name):
        return self.header[name]["data_offsets"][0]


def truncated_in_data(w):
    raw = w.path.read_bytes()
    w.path.write_bytes(raw[: len(raw) // 2])
    return "truncated"


def truncated_by_a_byte(w):
    w.path.write_bytes(w.path.read_bytes()[:-1])
    return "truncated"


def truncated_in_header(w):
    w.path.write_bytes(w.path.read_bytes()[:40])
    return "header"


def flipped_header_length(w):
    raw = bytearray(w.path.read_bytes())
    raw[4] ^= 1
    w.path.write_bytes(raw)
    return "bytes 0 to 7"


def oversized_header(w):
    w.write(length=1 << 40)
    return "over the"


def wrong_dtype(w):
    w.header[Q]["dtype"] = "I32"
    w.write()
    return Q


def wrong_shape(w):
    w.header[Q]["shape"].reverse()
    w.header[Q]["shape"][0] //= 2
    w.header[Q]["shape"][1] *= 2
    w.write()
    return Q


def code_three(w):
    w.data[w.start(Q) + 7] |= 0b110000
    w.write()
    return f"{Q}.*code 3.*byte 7"


def nan_scale(w):
    w.data[w.start(Q + "_scale") : w.start(Q + "_scale") + 4] = struct.pack("<f", float("nan"))
    w.write()
    return f"{Q}.*scale nan"


def zero_scale(w):
    w.data[w.start(Q + "_scale") : w.start(Q + "_scale") + 4] = bytes(4)
    w.write()
    return f"{Q}.*scale 0"


def nan_norm(w):
    name = "model.norm.weight"
    w.data[w.start(name) : w.start(name) + 4] = struct.pack("<f", float("nan"))
    w.write()
    return "model.norm.weight"


def missing_tensor(w):
    entry = w.header.pop("model.norm.weight")
    w.header["unknown.weight"] = entry
    w.write()
    return "model.norm.weight"


def missing_scale(w):
    w.header["other.bias"] = w.header.pop(Q + "_scale")
    w.write()
    return Q


def duplicate_key(w):
    text = json.dumps(w.header)
    entry = json.dumps({Q: w.header[Q]})[1:-1]
    w.write(text[:-1] + ", " + entry + "}")
    return f"{Q}.*twice"


def overlapping(w):
    w.header[Q]["data_offsets"] = [n - 8 for n in w.header[Q]["data_offsets"]]
    w.write()
    return "overlaps|gap"


def not_json(w):
    w.write("{" + "x" * 50)
    return "not JSON at byte 9"


DAMAGE = [
    truncated_in_data,
    truncated_by_a_byte,
    truncated_in_header,
    flipped_header_length,
    oversized_header,
    wrong_dtype,
    wrong_shape,
    code_three,
    nan_scale,
    zero_scale,
    nan_norm,
    missing_tensor,
    missing_scale,
    duplicate_key,
    overlapping,
    not_json,
]


@pytest.fixture
def copy_of(tmp_path):
    def copy(name):
        return shutil.copytree(ROOT / name, tmp_path / name)

    return copy


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_packed_file_is_refused(damage, copy_of, tmp_path):
    directory = copy_of(PACKED)
    read_all(directory)
    named = damage(Weights(directory / "model.safetensors"))
    with pytest.raises(DamagedCheckpointError, match=named):
        read_all(directory)
    with pytest.raises(CheckpointError, match=named):
        convert(directory, tmp_path / "out", "native")
    assert [entry.name for entry in tmp_path.iterdir()] == [PACKED]


def test_a_missing_head_is_named(copy_of):
    directory = copy_of(PACKED)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(DamagedCheckpointError, match=r"lm_head\.weight"):
        read_all(directory)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_leads_nowhere_else(name, copy_of):
    directory = copy_of("hf-packed-sharded")
    read_all(directory)
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][Q] = name
    file.write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=name.replace(".", r"\.")):
        read_all(directory)


def test_an_index_entry_without_a_tensor_is_named(copy_of):
    directory = copy_of("hf-packed-sharded")
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"][Q]
    file.write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=r"ghost\.weight"):
        read_all(directory)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("linear_class", "autobitlinaer", "Did you mean 'autobitlinear'"),
        ("quantization_mode", "online", "online"),
        ("quant_method", "gptq", "gptq"),
        ("modules_to_not_convert", [Q.removesuffix(".weight"), "lm_head"], Q),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(key, value, named, copy_of):
    directory = copy_of(PACKED)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        read_all(directory)


class Marker:
    """Unpickling it would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_does_not_run(protocol, tmp_path):
    file, marker = tmp_path / "model.pt", tmp_path / "ran"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"a": Marker(str(marker))}, protocol))
        archive.writestr("model/version", "3\n")
    with pytest.raises(CheckpointError, match=r"byte \d+ of data\.pkl imports (posix|os)\.mkdir"):
        open_checkpoint(file)
    assert not marker.exists()
    file.write_bytes(pickle.dumps({"a": Marker(str(marker))}))
    with pytest.raises(CheckpointError, match="bare pickle"):
        open_checkpoint(file)
    assert not marker.exists()


def flip(path, at=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("file", ["forge.json", "model.safetensors", "manifest.json"])
def test_a_flipped_bit_in_a_native_package_names_its_file(file, copy_of):
    directory = copy_of("native")
    read_all(directory)
    flip(directory / file)
    with pytest.raises(DamagedCheckpointError, match=file.replace(".", r"\.")):
        read_all(directory)


def test_a_native_package_is_exactly_its_manifest(copy_of):
    directory = copy_of("native")
    (directory / "extra.txt").write_text("x")
    with pytest.raises(DamagedCheckpointError, match=r"extra\.txt"):
        read_all(directory)
    (directory / "extra.txt").unlink()
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = [e for e in manifest["files"] if e["path"] != "model.safetensors"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        read_all(directory)


def test_a_stale_manifest_is_noticed(copy_of):
    directory = copy_of("native")
    weights = Weights(directory / "model.safetensors")
    weights.data[weights.start("odd.weight")] ^= 0b01
    weights.path.write_bytes(weights.path.read_bytes()[: -len(weights.data)] + bytes(weights.data))
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        read_all(directory)


def gguf_damage():
    data = (ROOT / "gguf-tq2_0" / "model.gguf").read_bytes()
    yield "truncated", data[: len(data) // 2], "truncated"
    yield "header", data[:60], "truncated|claim"
    yield "version", data[:4] + struct.pack("<I", 9) + data[8:], "version 9"
    yield "counts", data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "tensors"
    at = data.index(b"blk.0.attn_q.weight")
    yield "type", data[: at + 39] + struct.pack("<I", 38) + data[at + 43 :], "TL1"


@pytest.mark.parametrize(("name", "content", "named"), list(gguf_damage()))
def test_a_damaged_gguf_file_is_refused(name, content, named, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        read_all(file)


@pytest.mark.parametrize("kind", ["gguf-tq1_0", "gguf-tq2_0"])
def test_an_illegal_block_is_named(kind, copy_of):
    file = copy_of(kind) / "model.gguf"
    with open_checkpoint(file) as opened:
        place = opened.stored[Q].start
    raw = bytearray(file.read_bytes())
    # 0xff is three digits of 3 in TQ2_0 and no multiple of 256 / 243 in TQ1_0's last bytes.
    raw[place + (48 if kind == "gguf-tq1_0" else 5)] = 0xFF
    file.write_bytes(raw)
    with pytest.raises(DamagedCheckpointError, match=f"{Q}.*0xff.*block 0 of row 0"):
        read_all(file)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.gguf", "pytorch_model.bin", "in/model.gguf", "any"]
)
def test_a_file_that_git_lfs_did_not_fetch_is_named(name, tmp_path):
    """As a clone without the program leaves it: nothing is damaged, and no pickle is there."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    path = file.parent if "/" in name or file.suffix == ".safetensors" else file
    with pytest.raises(
        CheckpointError, match=r"pointer that Git LFS keeps .* `git lfs pull`"
    ) as no:
        open_checkpoint(path)
    assert not isinstance(no.value, DamagedCheckpointError)
    assert str(file) in str(no.value)


def test_nothing_and_the_unknown_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="the directory holds nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello world")
    with pytest.raises(CheckpointError, match="starts with b'hello wo'"):
        open_checkpoint(tmp_path / "notes.txt")
