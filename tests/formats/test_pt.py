"""Archives of torch.save: what is read is what was saved, or nothing is."""

from __future__ import annotations

import contextlib
import zipfile

import pytest
import torch
from torch import nn

from forge_harness.errors import CheckpointError, DamagedCheckpointError, ExitCode
from forge_harness.formats import ReadOptions
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.inspection import inspect_checkpoint

WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"a.weight": WEIGHT}, file)
    return file


def packed_again(file, *, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    """The same records in another archive, each as `change` returns it; None leaves one out."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)


def read_all(file):
    with open_checkpoint(file, ReadOptions(quantize=("a",))) as opened:
        return {name: opened.plain(name) for name in opened.plain_names()} | {
            name: opened.master(name) for name in opened.ternary_names()
        }


def compressed(file):
    packed_again(file, compression=zipfile.ZIP_DEFLATED)
    return "record 'model/data.pkl' is compressed"


def short(file):
    packed_again(file, change=lambda name, data: data[:8] if name.endswith("/data/0") else data)
    return "record data/0 holds 8 bytes, and its tensors need 512"


def long(file):
    packed_again(file, change=lambda name, data: data * (1 + name.endswith("/data/0")))
    return "record data/0 holds 1024 bytes, and its tensors need 512"


def missing(file):
    packed_again(file, change=lambda name, data: None if name.endswith("/data/0") else data)
    return "record data/0 is missing, and its tensors need 512"


def flipped(file):
    raw = bytearray(file.read_bytes())
    raw[raw.find(WEIGHT.numpy().tobytes()) + 3] ^= 1
    file.write_bytes(raw)
    return "record 'model/data/0' does not have the CRC-32"


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def twice(file):
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/data/0", bytes(512))
    return "record 'model/data/0' is there twice"


def repeated(file):
    torch.save({"a.weight": torch.zeros(1).expand(10**6, 10**6)}, file)
    return "takes 4000000000000 bytes and has 4"


def empty(file):
    torch.save({"a.weight": torch.zeros(10**9, 0)}, file)
    return "has shape [1000000000, 0]; expected values"


def surrogate(file):
    torch.save({"a\ud800.weight": WEIGHT}, file)
    return "no valid Unicode"


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    "damage", [compressed, short, long, missing, flipped, twice, repeated, empty, surrogate]
)
def test_an_archive_with_other_numbers_is_refused(damage, saved):
    assert torch.equal(read_all(saved)["a.weight"], WEIGHT)
    said = damage(saved)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_all(saved)
    assert said in str(caught.value)
    assert caught.value.exit_code == ExitCode.VERIFICATION_FAILED
    with contextlib.suppress(DamagedCheckpointError):  # Its structure says so already.
        assert not inspect_checkpoint(saved).sound


def test_an_archive_packed_again_uncompressed_is_the_same(saved):
    packed_again(saved)
    assert torch.equal(read_all(saved)["a.weight"], WEIGHT)


def test_views_shared_and_negated_tensors_are_read_as_torch_reads_them(tmp_path):
    base = torch.randn(6, 10)
    state = {
        "a.weight": base.t(),
        "b.tied.weight": base.t(),
        "b.rows.weight": base[1:4, ::2],
        "b.half.weight": torch.randn(3, 4).half(),
        "b.sign.weight": torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        "b.count": torch.tensor(3),
        "b.none": torch.zeros(0),
        "b.parameter": nn.Parameter(torch.randn(3)),
    }
    torch.save(state, tmp_path / "model.pt")
    read = read_all(tmp_path / "model.pt")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor)
        assert read[name].numpy().tolist() == tensor.tolist()


def test_what_else_a_training_script_saved_is_left_alone(tmp_path):
    """One storage, shared by the weights and by an optimizer nobody reads."""
    content = {
        "model": {"a.weight": WEIGHT, "b.weight": WEIGHT.t()},
        "optimizer": {"state": {0: {"exp_avg": WEIGHT, "step": 3}}, "param_groups": [{"lr": 0.1}]},
        "shape": WEIGHT.shape,
        "note": ("x", None, [1.5]),
    }
    torch.save(content, tmp_path / "model.pt")
    assert torch.equal(read_all(tmp_path / "model.pt")["b.weight"], WEIGHT.t())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"FloatStorage", b"DoubleStorage", "holds 512 bytes, and its tensors need 1024"),
        (b"X\x01\x00\x00\x000", b"K\x00", "it asks for a storage 0 of 128 values"),
        (b"K\x80t", b"K\x7ft", "holds 512 bytes, and its tensors need 508"),
        (b"K\x80t", b"X\x01\x00\x00\x009t", "it asks for a storage '0' of '9' values"),
    ],
)
def test_a_pickle_and_records_that_disagree_are_refused(old, new, said, saved):
    def changed(name, data):
        if name.endswith("/data.pkl"):
            assert data.count(old) >= 1
            return data.replace(old, new)
        return data

    packed_again(saved, change=changed)
    with pytest.raises(DamagedCheckpointError, match=said):
        read_all(saved)


def test_a_pickle_that_asks_for_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(DamagedCheckpointError, match="memo 2147483647"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_weight_with_a_scale_does_not_lose_it(dtype, tmp_path):
    """Codes of a Hugging Face model, saved as a state dict: without scales they are others."""
    codes = torch.ones(8, 16, dtype=dtype)
    torch.save({"a.weight": codes, "a.weight_scale": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"'a\.weight' has a scale beside it"):
        inspect_checkpoint(tmp_path / "model.pt")
