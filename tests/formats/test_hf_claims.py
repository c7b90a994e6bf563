"""What a Hugging Face directory claims beside its codes: norms in layers, scales, whole models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import ReadOptions
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.paths import fixtures_dir

PACKED = fixtures_dir() / "checkpoints" / "hf-packed-autobitlinear-tied"
DIGITS = fixtures_dir() / "models" / "v1.0"
Q = "model.layers.0.self_attn.q_proj"


def changed(directory, *, config=None, quantization=None, tensors=None, source=PACKED):
    """A copy of a directory with changed configuration and tensors (None: taken out)."""
    shutil.copytree(source, directory)
    document = json.loads((directory / "config.json").read_text())
    document |= config or {}
    document["quantization_config"] |= quantization or {}
    (directory / "config.json").write_text(json.dumps(document))
    if tensors:
        stored = load_file(directory / "model.safetensors") | tensors
        kept = {name: value for name, value in stored.items() if value is not None}
        save_file(kept, directory / "model.safetensors")
    return directory


def with_norms(directory, **changes):
    with open_checkpoint(PACKED) as opened:
        norms = {
            f"{name.removesuffix('weight')}rms_norm.weight": torch.rand(opened.infos[name].shape[1])
            for name in opened.ternary_names()
        }
    stated = {"use_rms_norm": True, "rms_norm_eps": 1e-3}
    return changed(directory, quantization=stated, tensors=norms | changes)


@pytest.mark.parametrize("to", ["hf-packed", "hf-online"])
def test_norms_in_layers_reach_the_other_hugging_face_formats(to, tmp_path):
    source = with_norms(tmp_path / "source")
    convert(source, tmp_path / "out", to)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = document["quantization_config"]
    assert (stated["use_rms_norm"], stated["rms_norm_eps"]) == (True, 1e-3)
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "out") as two:
        name = f"{Q}.rms_norm.weight"
        assert torch.equal(one.plain(name), two.plain(name))


@pytest.mark.parametrize("to", ["native", "gguf-tq2_0"])
def test_norms_in_layers_are_refused_where_nothing_applies_them(to, tmp_path):
    source = with_norms(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"use_rms_norm true.*convert to hf-packed"):
        convert(source, tmp_path / "out", to)
    with open_checkpoint(source) as opened, pytest.raises(CheckpointError, match="use_rms_norm"):
        model_from_checkpoint(opened)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "is missing, and use_rms_norm"), (torch.ones(3), r"has shape \[3\]; expected \[64\]")],
)
def test_norms_in_layers_must_be_there(value, words, tmp_path):
    source = with_norms(tmp_path / "source", **{f"{Q}.rms_norm.weight": value})
    with pytest.raises(DamagedCheckpointError, match=rf"q_proj\.rms_norm\.weight' {words}"):
        open_checkpoint(source)


def test_a_norm_in_a_layer_that_nothing_calls_for_is_left_over(tmp_path):
    norm = {f"{Q}.rms_norm.weight": torch.ones(64)}
    source = changed(tmp_path / "source", tensors=norm)
    with pytest.raises(DamagedCheckpointError, match=r"rms_norm\.weight' is left over"):
        open_checkpoint(source)


def unpacked(packed):
    return torch.cat([((packed >> 2 * field) & 3).bfloat16() - 1 for field in range(4)])


@pytest.mark.parametrize("told", [None, "multiply"])
def test_codes_that_are_not_packed_do_not_lose_their_scale(told, tmp_path):
    codes = unpacked(load_file(PACKED / "model.safetensors")[f"{Q}.weight"])
    source = changed(
        tmp_path / "source", config={"model_type": "mistral"}, tensors={f"{Q}.weight": codes}
    )
    if told:
        (source / "config.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"'{Q}\.weight_scale' is the scale of a"):
        open_checkpoint(source, ReadOptions(scale_convention=told))


@pytest.mark.parametrize("name", ["model.norm.weight_scale", "zzz.weight_scale"])
def test_a_scale_of_no_codes_is_damage(name, tmp_path):
    source = changed(tmp_path / "source", tensors={name: torch.ones(1)})
    with pytest.raises(DamagedCheckpointError, match=rf"'{name}' is the scale of a"):
        open_checkpoint(source)


def test_a_model_of_this_package_must_be_whole(tmp_path):
    convert(DIGITS, tmp_path / "packed", "hf-packed")
    gone = {"blocks.0.down.weight": None, "blocks.0.down.weight_scale": None}
    source = changed(tmp_path / "source", tensors=gone, source=tmp_path / "packed")
    with pytest.raises(DamagedCheckpointError, match=r"'blocks\.0\.down\.weight' is missing"):
        open_checkpoint(source)


def test_a_tensor_cannot_be_tied_to_one_that_is_not_there(tmp_path):
    tied = {"forge_harness": {"tied": {"lm_head.weight": "nope"}}}
    source = changed(tmp_path / "source", config=tied)
    with pytest.raises(DamagedCheckpointError, match=r"'lm_head\.weight' is tied to 'nope', which"):
        open_checkpoint(source)
