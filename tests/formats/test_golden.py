"""Golden checkpoints: their bytes, and what every reader, ours and others', finds in them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from forge_harness.errors import CheckpointError
from forge_harness.formats import ReadOptions
from forge_harness.formats.detect import detect, open_checkpoint
from forge_harness.formats.digests import codes_sha256
from forge_harness.paths import fixtures_dir

from . import independent

ROOT = fixtures_dir() / "checkpoints"
TRUTH = json.loads((ROOT / "truth.json").read_text(encoding="utf-8"))


def path_of(name):
    return ROOT / name / TRUTH[name]["open"]


def options_of(name):
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in TRUTH[name]["options"].items()}
    return ReadOptions(**given)


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_no_byte_has_changed():
    for line in (ROOT / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, name


def test_the_maker_makes_these_bytes(tmp_path):
    command = [sys.executable, str(ROOT / "make_checkpoints.py"), "--out", str(tmp_path), "--truth"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(made) > len(TRUTH)
    for name, content in made.items():
        assert (ROOT / name).read_bytes() == content, name


@pytest.mark.parametrize("name", TRUTH)
def test_our_reader_finds_what_the_maker_put_in(name):
    truth = TRUTH[name]
    assert detect(path_of(name)).format == truth["format"]
    with open_checkpoint(path_of(name), options_of(name)) as opened:
        assert (opened.format, dict(opened.tied)) == (truth["format"], truth["tied"])
        assert set(opened.ternary_names()) == set(truth["ternary"])
        assert set(opened.plain_names()) == set(truth["plain"])
        for weight, expected in truth["ternary"].items():
            ternary = opened.ternary(weight)
            assert list(ternary.shape) == expected["shape"]
            assert codes_sha256(ternary) == expected["codes_sha256"]
            assert [float(s).hex() for s in ternary.scales] == expected["scales"]
            assert torch.equal(opened.scales(weight), ternary.scales)
            assert list(ternary.parts) == expected["parts"]
        for weight, expected in truth["plain"].items():
            raw = opened.plain(weight).contiguous().reshape(-1).view(torch.uint8).numpy()
            assert sha(raw) == expected["sha256"], weight


@pytest.mark.parametrize("name", [n for n in TRUTH if {*TRUTH[n]["options"]} - {"quantize"}])
def test_what_the_files_do_not_say_is_asked_for(name):
    (question,) = detect(path_of(name)).questions
    option = next(iter(TRUTH[name]["options"])).replace("_", "-")
    assert f"--{option}" in question
    with pytest.raises(CheckpointError, match=f"--{option}"):
        open_checkpoint(path_of(name))


DECODERS = {
    "native": independent.native,
    "native-digits": independent.native,
    "native-0.9": independent.native_09,
    "hf-packed-autobitlinear-tied": lambda p: independent.hf_packed(p, divide=False),
    "hf-packed-sharded": lambda p: independent.hf_packed(p, divide=False),
    "hf-packed-bitlinear-untied": lambda p: independent.hf_packed(p, divide=True),
    "hf-packed-without-config": lambda p: independent.hf_packed(p, divide=True),
    "hf-unpacked": lambda p: independent.dense(p, "codes"),
    "hf-fake-quant": lambda p: independent.dense(p, "fake"),
    "hf-online": lambda p: independent.dense(p, "masters"),
    "legacy-safetensors": lambda p: independent.dense(p, "masters"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_an_independent_decoder_finds_the_same(name):
    found = DECODERS[name](ROOT / name)
    assert set(found) == set(TRUTH[name]["ternary"])
    for weight, (codes, scales, parts) in found.items():
        expected = TRUTH[name]["ternary"][weight]
        assert sha(codes) == expected["codes_sha256"]
        assert [float(s).hex() for s in np.float32(scales)] == expected["scales"]
        assert list(parts) == expected["parts"]


@pytest.mark.parametrize("name", ["gguf-tq1_0", "gguf-tq2_0", "gguf-tq2_0-scale"])
def test_gguf_and_an_independent_decoder_agree(name):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path_of(name))
    decode = {34: independent.tq1_0, 35: independent.tq2_0}
    checked = 0
    with open_checkpoint(path_of(name)) as opened:
        for tensor in reader.tensors:
            if int(tensor.tensor_type) not in decode:
                continue
            weight = next(n for n, t in opened.stored.items() if t.name == tensor.name)
            columns, rows = (int(n) for n in tensor.shape)
            codes, d = decode[int(tensor.tensor_type)](tensor.data.tobytes(), rows, columns)
            assert sha(codes) == TRUTH[name]["ternary"][weight]["codes_sha256"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            block = np.repeat(d.astype(np.float32), 256, axis=1)
            np.testing.assert_array_equal(values, codes * block)
            checked += 1
    assert checked == 7


@pytest.mark.parametrize("layout", ["x86-act", "arm", "x86-rows"])
def test_an_independent_decoder_reads_i2_s(layout):
    name = f"gguf-i2_s-{layout}"
    with open_checkpoint(path_of(name), options_of(name)) as opened:
        weight = "model.layers.0.self_attn.k_proj.weight"
        stored = opened.stored[weight]
        codes, scale = independent.i2_s(bytes(opened.file.read(stored)), *stored.shape, layout)
    expected = TRUTH[name]["ternary"][weight]
    assert sha(codes) == expected["codes_sha256"]
    assert [float(s).hex() for s in scale] == expected["scales"]


def test_torch_reads_the_state_dict_written_by_hand():
    state = torch.load(path_of("legacy-pt"), weights_only=True)
    with open_checkpoint(path_of("legacy-pt"), options_of("legacy-pt")) as opened:
        assert set(state) == set(opened.infos)
        for name in opened.infos:
            read = opened.master(name) if opened.infos[name].master else opened.plain(name)
            assert torch.equal(read, state[name])
