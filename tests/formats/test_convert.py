"""Conversion between every pair of formats: codes bit for bit, whole or not there."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.cli import app
from forge_harness.cli import convert as command
from forge_harness.durable import staged_directory
from forge_harness.errors import CheckpointError, DamagedCheckpointError, ExitCode
from forge_harness.formats import FORMATS, TernaryTensor, WriteOptions
from forge_harness.formats import convert as conversion
from forge_harness.formats.comparison import compared
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.hf_writer import write_hf_packed
from forge_harness.formats.native import write_native
from forge_harness.quant import EPS

from .memory import hf_checkpoint, memory_checkpoint, random_ternary

SCALE_ROUNDING = 2.0**-21
"""Latents made from codes and scale are averaged again in fp32, and each sum rounds: 3.0e-7 for
10 x 10 weights of scale 0.037, where two roundings alone would be 2.4e-7."""


def written(source, path):
    """The source as a native package."""
    with staged_directory(path) as stage:
        write_native(source, stage, WriteOptions())
    return path


def contents(path):
    """Ternary (codes, scale) and plain values of a checkpoint, without names."""
    with open_checkpoint(path) as opened:
        coded = sorted(
            (part.codes().numpy().tobytes(), part.shape, float(part.scales[0]))
            for name in opened.ternary_names()
            for part in opened.ternary(name).split()
        )
        plain = sorted(opened.plain(n).float().numpy().tobytes() for n in opened.plain_names())
        return coded, plain


def assert_same(one, two):
    assert [c[:2] for c in one[0]] == [c[:2] for c in two[0]]
    np.testing.assert_allclose(
        [c[2] for c in one[0]], [c[2] for c in two[0]], rtol=SCALE_ROUNDING, atol=0
    )
    assert one[1] == two[1]


def destination(root, name, to):
    return root / (f"{name}.gguf" if to.startswith("gguf") else name)


@pytest.mark.parametrize("family", ["bitnet", "llama"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_codes_survive_every_pair_of_formats(first, second, family, tmp_path):
    changes = {"model_type": family, "tie_word_embeddings": family == "bitnet"}
    changes["hidden_act"] = "relu2" if family == "bitnet" else "silu"
    start = written(hf_checkpoint(**changes), tmp_path / "start")
    one, two = destination(tmp_path, "one", first), destination(tmp_path, "two", second)
    convert(start, one, first)
    report = convert(one, two, second)
    assert report.comparison.codes_changed == report.comparison.plain_changed == 0
    assert_same(contents(start), contents(two))
    with open_checkpoint(start) as before, open_checkpoint(two) as after:
        assert sorted(before.infos) == sorted(after.infos)
        assert dict(before.tied) == dict(after.tied)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 130),
    to=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
def test_odd_shapes_come_back_from_every_format(rows, columns, to, seed, tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    ternary = random_ternary(rows, columns, scales=(0.037,), seed=seed)
    ternary.packed[0, 0] |= 0  # the property holds for any codes, all-zero tensors aside
    if not ternary.codes().any():
        return
    source = memory_checkpoint({"a.weight": ternary}, {"b.weight": torch.randn(columns)})
    start = written(source, root / "start")
    there, back = destination(root, "there", to), root / "back"
    convert(start, there, to)
    convert(there, back, "native")
    assert_same(contents(start), contents(back))


def test_fused_projections_are_split_where_a_format_has_one_scale(tmp_path):
    config = {
        "vocabulary": 16,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "hidden": 16,
        "context": 8,
        "rope_theta": 10000.0,
        "sub_norm": False,
        "fused_qkv": True,
        "residual_init": 0.5,
    }
    fused = random_ternary(24, 8, scales=(0.1, 0.2, 0.4), parts=(8, 8, 8))
    coded = {
        "blocks.0.attention.qkv.weight": fused,
        "blocks.0.attention.o.weight": random_ternary(8, 8, seed=1),
        "blocks.0.ffn.gate.weight": random_ternary(16, 8, seed=2),
        "blocks.0.ffn.up.weight": random_ternary(16, 8, seed=3),
        "blocks.0.ffn.down.weight": random_ternary(8, 16, seed=4),
    }
    others = {
        "embedding.weight": torch.randn(16, 8),
        "norm.weight": torch.ones(8),
        "blocks.0.attention_norm.weight": torch.ones(8),
        "blocks.0.ffn_norm.weight": torch.full((8,), 2.0),
    }
    source = memory_checkpoint(
        coded,
        others,
        family="byte-lm",
        config=config,
        tied={"head.weight": "embedding.weight"},
    )
    start = written(source, tmp_path / "start")
    for to in FORMATS:
        out = destination(tmp_path, f"out-{to}", to)
        report = convert(start, out, to)
        assert report.comparison.ternary == 7
        assert_same(contents(start), contents(out))
    with open_checkpoint(tmp_path / "out-hf-packed") as packed:
        names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
        for name, part in zip(names, fused.split(), strict=True):
            assert torch.equal(packed.ternary(name).codes(), part.codes())
            assert packed.ternary(name).scales.tolist() == part.scales.tolist()


def test_a_writer_that_changes_codes_is_caught_and_leaves_nothing(tmp_path, monkeypatch):
    def turned(source, path, options):
        coded = {n: random_ternary(*source.ternary(n).shape, seed=9) for n in source.coded}
        return write_native(memory_checkpoint(coded, source.others), path, options)

    source = memory_checkpoint({"a.weight": random_ternary(8, 8)}, {})
    monkeypatch.setitem(conversion._WRITERS, "native", turned)
    monkeypatch.setattr(conversion, "open_checkpoint", opener({"source": source}))
    (tmp_path / "source").mkdir()
    with pytest.raises(DamagedCheckpointError, match="codes of 1 tensors"):
        convert(tmp_path / "source", tmp_path / "out", "native")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def opener(known):
    real = open_checkpoint
    return lambda path, options=None: known.get(path.name) or real(path, options)


def test_a_comparison_counts_what_differs():
    one = memory_checkpoint(
        {"a": random_ternary(8, 8), "b": random_ternary(8, 8, seed=1)}, {"c": torch.ones(3)}
    )
    two = memory_checkpoint(
        {"x": random_ternary(8, 8, scales=(0.055,)), "y": random_ternary(8, 8, seed=2)},
        {"z": torch.zeros(3)},
    )
    found = compared(one, two)
    assert (found.codes_changed, found.plain_changed) == (1, 1)
    assert found.scale_change == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["codes of 2 tensors", "values of 2 others"])
def test_a_writer_that_swaps_two_tensors_is_caught(kind, tmp_path, monkeypatch):
    """What is there is the same as before; the model is another one."""

    def swapped(source, path, options):
        coded, others = dict(source.coded), dict(source.others)
        turned, (one, two) = (coded, "ab") if kind.startswith("codes") else (others, "cd")
        turned[f"{one}.weight"], turned[f"{two}.weight"] = (
            turned[f"{two}.weight"],
            turned[f"{one}.weight"],
        )
        return write_native(memory_checkpoint(coded, others), path, options)

    source = memory_checkpoint(
        {"a.weight": random_ternary(8, 8), "b.weight": random_ternary(8, 8, seed=1)},
        {"c.weight": torch.ones(3), "d.weight": torch.zeros(3)},
    )
    monkeypatch.setitem(conversion._WRITERS, "native", swapped)
    monkeypatch.setattr(conversion, "open_checkpoint", opener({"source": source}))
    (tmp_path / "source").mkdir()
    with pytest.raises(DamagedCheckpointError, match=kind):
        convert(tmp_path / "source", tmp_path / "out", "native")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_writer_that_moves_scales_is_caught(factor, tmp_path, monkeypatch):
    """It was said, "scales by at most 0.01", and the result was kept."""
    source = memory_checkpoint({"a.weight": random_ternary(8, 8)}, {})
    other = memory_checkpoint({"a.weight": random_ternary(8, 8, scales=(0.05 * factor,))}, {})
    monkeypatch.setitem(conversion._WRITERS, "native", lambda source, path, options: [])
    opened = iter((source, other))
    monkeypatch.setattr(conversion, "open_checkpoint", lambda path, options=None: next(opened))
    (tmp_path / "source").mkdir()
    with pytest.raises(DamagedCheckpointError, match=r"scales by up to (0\.01|nan) \(at most"):
        convert(tmp_path / "source", tmp_path / "out", "native")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_scales_are_compared_under_their_names():
    one, two = random_ternary(8, 8, scales=(0.1,)), random_ternary(8, 8, scales=(0.2,))
    found = compared(
        memory_checkpoint({"a": one, "b": two}, {}), memory_checkpoint({"a": two, "b": one}, {})
    )
    assert (found.codes_changed, found.scale_change) == (0, pytest.approx(1.0))


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_sentence_and_nothing_is_left(to, tmp_path, monkeypatch):
    start = written(hf_checkpoint(), tmp_path / "start")
    sync = os.fsync

    def full(descriptor):
        if ".partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert(start, destination(tmp_path, "out", to), to)
    assert [entry.name for entry in tmp_path.iterdir()] == ["start"]


def test_what_is_in_the_way_stays(tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        convert(start, full, "hf-packed")
    with pytest.raises(CheckpointError, match="source and destination"):
        convert(start, start, "native")
    with pytest.raises(CheckpointError, match="inside the source"):
        convert(start, start / "inside", "native")
    file = tmp_path / "a.gguf"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match="exists"):
        convert(start, file, "gguf-tq2_0")
    assert ((full / "mine").read_text(), file.read_text()) == ("kept", "kept")


def test_of_two_conversions_to_one_file_the_first_stays(tmp_path, monkeypatch):
    """The second wrote over it, and both said that all was well."""
    start, target = written(hf_checkpoint(), tmp_path / "start"), tmp_path / "model.gguf"
    slow = conversion._WRITERS["gguf-tq2_0"]

    def overtaken(source, path, options):
        convert(start, target, "gguf-tq1_0")
        return slow(source, path, options)

    monkeypatch.setitem(conversion._WRITERS, "gguf-tq2_0", overtaken)
    with pytest.raises(CheckpointError, match=r"model\.gguf' exists; name a new file"):
        convert(start, target, "gguf-tq2_0")
    with open_checkpoint(target) as kept:
        assert kept.format == "gguf-tq1_0"
    assert {entry.name for entry in tmp_path.iterdir()} == {"start", "model.gguf"}


def test_a_link_that_ends_nowhere_is_in_the_way(tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    for to in ("gguf-tq2_0", "native"):
        link = tmp_path / to
        link.symlink_to("not there yet")
        with pytest.raises(CheckpointError, match=f"{to}' (is a link that ends nowhere|exists)"):
            convert(start, link, to)
        assert link.is_symlink()


def test_gguf_goes_into_an_existing_directory(tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    (tmp_path / "models").mkdir()
    report = convert(start, tmp_path / "models", "gguf-tq2_0")
    assert Path(report.destination) == tmp_path / "models" / "model.gguf"


@pytest.mark.parametrize("to", ["gguf-tq2_0", "hf-packed"])
def test_nothing_is_put_into_a_package(to, tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    convert(start, tmp_path / "package", "native")
    place = tmp_path / "package" / ("" if to.startswith("gguf") else "hf")
    with pytest.raises(CheckpointError, match=r"lies in a package whose manifest\.json"):
        convert(start, place, to)
    open_checkpoint(tmp_path / "package").close()


def test_the_command_says_what_it_did(tmp_path):
    assert command.FORMATS == FORMATS
    start = written(hf_checkpoint(), tmp_path / "start")
    run = CliRunner().invoke(app, ["convert", str(start), str(tmp_path / "o"), "--to", "hf-packed"])
    assert run.exit_code == 0
    assert "codes changed in 0" in run.stdout
    missing = CliRunner().invoke(app, ["convert", "nowhere", str(tmp_path / "p"), "--to", "native"])
    assert missing.exit_code == 4
    assert "'nowhere' does not exist" in missing.stderr


@pytest.mark.parametrize(
    ("to", "option", "value", "said"),
    [
        ("native", "--exclude", "*q_proj", "is native, where --exclude changes nothing"),
        ("native", "--quantize", "*", "is native, where --quantize changes nothing"),
        ("native", "--i2s-layout", "arm", "is native, where --i2s-layout changes nothing"),
        ("native", "--scale-convention", "divide", "where --scale-convention changes nothing"),
        ("native", "--hf-scale", "divide", "--hf-scale changes nothing in native"),
        ("hf-packed", "--gguf-scale", "block", "--gguf-scale changes nothing in hf-packed"),
        ("hf-packed", "--master-dtype", "BF16", "--master-dtype changes nothing in hf-packed"),
    ],
)
def test_a_choice_that_would_change_nothing_is_refused(to, option, value, said, tmp_path):
    start = written(hf_checkpoint(), tmp_path / "start")
    words = ["convert", str(start), str(tmp_path / "out"), "--to", to, option, value]
    run = CliRunner().invoke(app, words)
    assert (run.exit_code, said in run.stderr) == (4, True), run.stderr
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_read_is_named_as_the_user_named_it(tmp_path, monkeypatch):
    def dangling(source, path, options):
        return write_hf_packed(
            memory_checkpoint(source.coded, source.others, tied={"c.weight": "nope"}), path, options
        )

    source = memory_checkpoint({"a.weight": random_ternary(8, 8)}, {})
    monkeypatch.setitem(conversion._WRITERS, "hf-packed", dangling)
    monkeypatch.setattr(conversion, "open_checkpoint", opener({"source": source}))
    (tmp_path / "source").mkdir()
    with pytest.raises(CheckpointError, match="The result would not be readable: ") as caught:
        convert(tmp_path / "source", tmp_path / "out", "hf-packed")
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert str(tmp_path / "out" / "model.safetensors") in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_hf_online_refuses_a_scale_no_online_quantizer_makes(tmp_path):
    """The floor of the quantizer took the codes away; the user was asked to report it."""
    name, floor = "a.weight", float(np.float32(EPS))
    tiny = random_ternary(8, 8, scales=(1e-9,))
    source = written(memory_checkpoint({name: tiny}, {}), tmp_path / "source")
    done = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "online"), "--to", "hf-online"]
    )
    assert done.exit_code == ExitCode.USAGE, done.output
    assert "Tensor 'a.weight' has scale 1e-09" in done.output
    assert not (tmp_path / "online").exists()
    for number, kept in enumerate(
        (random_ternary(8, 8, scales=(floor,)), TernaryTensor.from_codes(*nothing(1e-9)))
    ):
        source = written(memory_checkpoint({name: kept}, {}), tmp_path / f"kept-{number}")
        report = convert(source, tmp_path / f"online-{number}", "hf-online")
        assert report.comparison.codes_changed == 0
        # What multiplies only zeros has no scale to lose: it was said to move by all of it.
        assert report.comparison.scale_change <= SCALE_ROUNDING


def nothing(scale):
    return torch.zeros(8, 8, dtype=torch.int8), torch.tensor([scale])
