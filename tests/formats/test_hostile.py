"""Files made to hang or break a reader: each is refused at once, in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions
from forge_harness.formats.detect import detect, open_checkpoint
from forge_harness.formats.inspection import inspect_checkpoint
from forge_harness.paths import fixtures_dir

from ..privileges import unprivileged

GOOD = {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def safetensors(path, header, data=bytes(16)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def shaped(shape, name="a.weight"):
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}


def escaped(header):
    return json.dumps(header).encode().replace(b"HALF", rb"\ud800")


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (shaped([10**18, 0]), b"", "expected values"),
        (shaped([0, 10**18]), b"", "expected values"),
        (shaped([0, 2**70], "b"), b"", "expected counts"),
        (shaped([0, 2**62, 2**62], "b"), b"", "expected counts"),
        (json.dumps(GOOD).encode().replace(b"[2,", b"[" + b"1" * 5000 + b","), bytes(16), "digits"),
        (escaped({"aHALF.weight": GOOD["a.weight"]}), bytes(16), "surrogate"),
        (escaped({**GOOD, "__metadata__": {"note": "HALF"}}), bytes(16), "surrogate"),
    ],
)
def test_a_hostile_header_is_refused(header, data, said, tmp_path):
    file = safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(DamagedCheckpointError, match=said) as caught:
        inspect_checkpoint(file)
    str(caught.value).encode()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_a_dtype_that_is_not_read_is_no_damage(dtype, tmp_path):
    save_file({"a.weight": torch.zeros(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' is stored as .*convert it") as caught:
        inspect_checkpoint(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_empty_tensors_that_are_no_matrix_are_read(tmp_path):
    file = safetensors(tmp_path / "model.safetensors", {**GOOD, **shaped([0, 2**40], "b")})
    assert inspect_checkpoint(file).sound


@pytest.mark.parametrize("config", [{"model_type": "HALF"}, {"a": [{"b": "HALF"}]}])
def test_half_a_character_in_a_configuration_is_refused(config, tmp_path):
    safetensors(tmp_path / "model.safetensors", GOOD)
    (tmp_path / "config.json").write_bytes(escaped(config))
    with pytest.raises(DamagedCheckpointError, match=r"config\.json is damaged.*surrogate"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "a.pt", "model.safetensors", "config.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name}' is a pipe"):
            inspect_checkpoint(path)


def test_a_scale_whose_reciprocal_is_infinite_is_damage(tmp_path):
    header = {
        "a.weight": {"dtype": "U8", "shape": [2, 4], "data_offsets": [4, 12]},
        "a.weight_scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    data = np.array([1e-40], "f4").tobytes() + b"\x55" * 8
    file = safetensors(tmp_path / "model.safetensors", header, data)
    found = inspect_checkpoint(file, ReadOptions(scale_convention="divide"))
    assert not found.sound
    assert "which gives infinity" in found.damage[0]
    assert inspect_checkpoint(file, ReadOptions(scale_convention="multiply")).sound


def written(path, tensors):
    writer = gguf.GGUFWriter(path, "bitnet")
    for key, value in {
        "context_length": 64, "embedding_length": 256, "block_count": 1,
        "feed_forward_length": 256, "attention.head_count": 4, "attention.head_count_kv": 4,
        "vocab_size": 8,
    }.items():  # fmt: skip
        writer.add_uint32(f"bitnet.{key}", value)
    writer.add_float32("bitnet.attention.layer_norm_rms_epsilon", 1e-5)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.TQ2_0 if array.shape == (256, 256) else None
        data = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("token_embd.weight", "model.embed_tokens.weight"), "model.embed_tokens.weight"),
        (("blk.0.attn_q.scale", "blk.0.attn_q_scale"), "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_two_gguf_tensors_of_one_meaning_are_refused(names, meant, tmp_path):
    one = np.ones(1, "f4") if "scale" in names[0] else np.ones((8, 256), "f4")
    tensors = {"blk.0.attn_q.weight": np.ones((256, 256), "f4")} | {
        name: number * one for number, name in enumerate(names, start=1)
    }
    file = written(tmp_path / "model.gguf", tensors)
    with pytest.raises(DamagedCheckpointError, match=f"both mean '{meant}'"):
        open_checkpoint(file)


@pytest.mark.parametrize("end", [".gguf", ".bin", ".pt"])
def test_a_directory_of_several_models_asks_for_one(end, tmp_path):
    """What a trainer leaves: arguments of training beside the weights."""
    for name in ("model", "training_args"):
        (tmp_path / f"{name}{end}").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=rf"model{end}, training_args{end}, .*; name it"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "forge.json"])
def test_a_file_that_may_not_be_read_is_no_place_to_write_to(name, tmp_path):
    source = "native" if name == "forge.json" else "hf-packed-autobitlinear-tied"
    shutil.copytree(fixtures_dir() / "checkpoints" / source, tmp_path / "model")
    (tmp_path / "model" / name).chmod(0)
    inspect = [sys.executable, "-m", "forge_harness", "inspect", str(tmp_path / "model")]
    found = subprocess.run([*unprivileged(), *inspect], capture_output=True, text=True, check=False)
    assert "cannot be read" in found.stdout + found.stderr
    assert "Permission denied" in found.stdout + found.stderr
    assert "written" not in found.stderr
