"""Which files of a Hugging Face directory are read: plain names that lie in it, nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.hf_files import inside, open_files
from forge_harness.protocols import TrainOptions
from forge_harness.training import QATSession
from forge_harness.training.checkpoint import save_session

ROOT = Path(__file__).parents[2] / "fixtures" / "checkpoints"


@pytest.fixture
def home(tmp_path):
    directory = tmp_path / "models" / "home"
    directory.mkdir(parents=True)
    (directory / "a.bin").write_bytes(b"a")
    (tmp_path / "outside.bin").write_bytes(b"b")
    return directory


def test_a_file_of_the_directory_is_given_as_it_is_named(home):
    assert inside(home, "a.bin", "key") == home / "a.bin"
    (home / "link.bin").symlink_to("a.bin")
    assert inside(home, "link.bin", "key") == home / "link.bin"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside.bin", "d/a.bin", "C:a.bin", "a\0", "\\"]
)
def test_a_path_is_no_plain_name(home, name):
    with pytest.raises(DamagedCheckpointError, match=r"key names .*; expected the plain name of a"):
        inside(home, name, "key")


def test_a_link_out_of_the_directory_is_named_with_its_end(home, tmp_path):
    (home / "b.bin").symlink_to("../../outside.bin")
    with pytest.raises(DamagedCheckpointError) as caught:
        inside(home, "b.bin", "key")
    target = str(tmp_path / "outside.bin")
    assert f"key names 'b.bin', a link to {target!r} outside the directory" in str(caught.value)


def test_the_cache_of_hugging_face_links_into_its_blobs(tmp_path):
    directory = tmp_path / "repo" / "snapshots" / "abc"
    directory.mkdir(parents=True)
    (tmp_path / "repo" / "blobs").mkdir()
    (tmp_path / "repo" / "blobs" / "1f").write_bytes(b"x")
    (tmp_path / "repo" / "other").write_bytes(b"x")
    (directory / "model.safetensors").symlink_to("../../blobs/1f")
    (directory / "config.json").symlink_to("../../other")
    assert inside(directory, "model.safetensors", "key") == directory / "model.safetensors"
    with pytest.raises(DamagedCheckpointError, match="outside the directory"):
        inside(directory, "config.json", "key")


@pytest.mark.parametrize("kind", ["missing", "dangling", "directory"])
def test_what_is_no_file_is_named(home, kind):
    if kind == "dangling":
        (home / "c.bin").symlink_to("nowhere.bin")
    elif kind == "directory":
        (home / "c.bin").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"key names 'c\.bin', and there is no such"):
        inside(home, "c.bin", "key")


@pytest.mark.parametrize("links", [{"c": "c"}, {"c": "d", "d": "e", "e": "c"}])
def test_links_that_lead_to_themselves_end_nowhere(home, links):
    for name, target in links.items():
        (home / name).symlink_to(target)
    with pytest.raises(DamagedCheckpointError, match="key names 'c', a link that ends nowhere"):
        inside(home, "c", "key")


def test_a_shard_that_links_to_itself_is_damage_of_the_index(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(ROOT / "hf-packed-bitlinear-untied", copy)
    os.replace(copy / "model.safetensors", copy / "part.safetensors")
    index = {"weight_map": {"lm_head.weight": "part.safetensors", "x": "loop.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(DamagedCheckpointError) as caught:
        open_files(copy)
    assert "key 'x', names 'loop.safetensors', a link that ends nowhere" in str(caught.value)
    assert caught.value.path == str(copy)


@pytest.mark.parametrize("source", ["hf-packed-bitlinear-untied", "hf-packed-sharded"])
def test_files_that_are_left_behind_are_named(source, tmp_path):
    directory = tmp_path / "source"
    shutil.copytree(ROOT / source, directory)
    beside = ["adapter_model.safetensors", "generation_config.json", "tokenizer.json"]
    save_file({"lora.weight": torch.ones(2, 2)}, directory / beside[0])
    for name in (*beside[1:], ".gitattributes"):
        (directory / name).write_text("{}")
    known = set(open_files(ROOT / source).unread)
    assert set(open_files(directory).unread) == {*known, *beside}
    with open_checkpoint(directory) as opened:
        odd = [anomaly.what for anomaly in opened.anomalies]
    assert "file 'adapter_model.safetensors' is no part of the model and is not read" in odd
    notes = convert(directory, tmp_path / "out", "hf-packed").notes
    assert all(repr(name) in notes[-1] for name in beside)
    assert ".gitattributes" not in notes[-1]


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.gguf"])
def test_files_beside_a_model_of_another_format_are_named(kind, tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    if kind.endswith(".gguf"):
        convert(ROOT / "hf-packed-bitlinear-untied", directory / kind, "gguf-tq2_0")
    else:
        torch.save({"a.weight": torch.randn(4, 8)}, directory / kind)
    for name in ("config.json", "tokenizer.json", ".gitattributes"):
        (directory / name).write_text("{}")
    notes = convert(directory, tmp_path / "out", "native").notes
    beside = "Not carried over from beside the model: 'config.json', 'tokenizer.json'."
    made = "1 matrix of full precision quantized on import ('a.weight'); --quantize and --exclude "
    assert notes == ((made + "choose others.", beside) if kind.endswith(".bin") else (beside,))


def test_many_files_beside_a_model_are_counted(tmp_path):
    directory = tmp_path / "source"
    shutil.copytree(ROOT / "hf-packed-bitlinear-untied", directory)
    for index in range(40):
        (directory / f"zz{index:02}.txt").write_text("")
    note = convert(directory, tmp_path / "out", "hf-packed").notes[-1]
    assert note.endswith(f" and {len(open_files(directory).unread) - 8} more.")


def test_a_checkpoint_of_a_training_is_no_damaged_model(tmp_path):
    """Its random state holds a NaN, which stands for "none pending"."""
    file = tmp_path / "step-0.safetensors"
    save_session(QATSession("digits", TrainOptions(steps=1)), file)
    with pytest.raises(CheckpointError, match=r"training session, .* name the package") as one:
        open_checkpoint(file)
    assert not isinstance(one.value, DamagedCheckpointError)
    with pytest.raises(CheckpointError, match="of a training session"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_of_a_sharded_training_is_told_too(tmp_path):
    save_file({"model.a.weight": torch.ones(2, 2)}, tmp_path / "shard-00001-of-00001.safetensors")
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="of a training session"):
        open_checkpoint(tmp_path)
