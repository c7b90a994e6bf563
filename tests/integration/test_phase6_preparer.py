"""`Phase6Preparer`: packages judged from their files, totals anyone recomputes, whole handoffs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil

import pytest

from forge_harness import Phase6Preparer
from forge_harness.canonical import tree_digest
from forge_harness.errors import CheckpointError, DamagedCheckpointError, UsageError
from forge_harness.formats.convert import convert
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.manifest import MANIFEST, write_manifest
from forge_harness.integration.baking_manifest import read_baking_manifest
from forge_harness.integration.fleet import export_fleet
from forge_harness.integration.phase6_preparer import NotReadyError, evaluate_shipped
from forge_harness.integration.readiness import judge
from forge_harness.paths import fixtures_dir
from forge_harness.types import Direction

FROZEN = fixtures_dir() / "models" / "v1.0"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A package with another format beside it; copy before changing it."""
    return Phase6Preparer().export(
        FROZEN, tmp_path_factory.mktemp("export") / "model", formats=["hf-packed"]
    )


@pytest.fixture
def package(exported, tmp_path):
    return shutil.copytree(exported.path, tmp_path / "model")


def edit(package, name, change):
    file = package / name
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")
    (package / "manifest.json").unlink()
    write_manifest(package)


def test_a_package_says_what_its_files_give(exported):
    description = json.loads((exported.path / "package.json").read_text())
    metrics = json.loads((exported.path / "metrics.json").read_text())
    lineage = json.loads((exported.path / "lineage.json").read_text())
    measured = evaluate_shipped("digits", exported.path)
    assert metrics["accuracy"] == {"value": measured["accuracy"], "unit": "1"}
    assert description["quality_score"] == measured["accuracy"]
    assert lineage["source_digest"] == tree_digest(FROZEN)
    size = sum((exported.path / n).stat().st_size for n in ("forge.json", "model.safetensors"))
    assert description["compression"]["package_bytes"] == size
    assert description["compression"]["fp32_ratio"] == 4 * description["parameters"] / size
    assert exported.readiness.status == "READY"


def test_the_manifest_lists_every_file_with_its_digest(exported):
    manifest = json.loads((exported.path / "manifest.json").read_text())
    listed = {entry["path"]: entry for entry in manifest["files"]}
    files = {
        p.relative_to(exported.path).as_posix(): p
        for p in exported.path.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert set(listed) == set(files)
    assert "hf-packed/model.safetensors" in listed
    for name, path in files.items():
        assert listed[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert listed[name]["bytes"] == path.stat().st_size


def test_the_format_beside_it_holds_the_same_codes(exported):
    with open_checkpoint(exported.path) as one, open_checkpoint(exported.path / "hf-packed") as two:
        assert sorted(one.ternary_names()) == sorted(two.ternary_names())
        for name in one.ternary_names():
            assert one.ternary(name).codes().equal(two.ternary(name).codes())
            assert one.scales(name).equal(two.scales(name))


def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    again = Phase6Preparer().export(FROZEN, tmp_path / "model", formats=["hf-packed"])
    assert again.digest == exported.digest


@pytest.mark.parametrize(
    ("file", "change", "criterion"),
    [
        ("metrics.json", lambda m: m["accuracy"].update(value=0.999), "claimed_metrics"),
        ("metrics.json", lambda m: m.pop("loss"), "claimed_metrics"),
        ("lineage.json", lambda m: m.pop("source_digest"), "completeness"),
        ("lineage.json", lambda m: m.pop("task"), "accuracy"),
        ("package.json", lambda m: m.pop("quality_score"), "completeness"),
    ],
)
def test_a_changed_package_is_not_ready(package, file, change, criterion):
    edit(package, file, change)
    found = Phase6Preparer().assess(package)
    assert found.status == "NOT_READY"
    assert criterion in [c.name for c in found.blocking]


@pytest.mark.parametrize(
    ("metrics", "criterion"),
    [
        ({"accuracy": 0.5, "loss": 1.0}, "accuracy"),
        ({"accuracy": float("nan"), "loss": 1.0}, "accuracy"),
        ({}, "accuracy"),
    ],
)
def test_bad_or_unmeasured_quality_writes_nothing(metrics, criterion, tmp_path):
    preparer = Phase6Preparer(evaluate=lambda task, path: metrics)
    with pytest.raises(NotReadyError, match=criterion):
        preparer.export(FROZEN, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_written_all_the_same_when_asked(tmp_path):
    source = fixtures_dir() / "checkpoints" / "hf-packed-sharded"
    with pytest.raises(NotReadyError, match="accuracy is not measured"):
        Phase6Preparer().export(source, tmp_path / "model")
    exported = Phase6Preparer().export(source, tmp_path / "model", allow_not_ready=True)
    assert exported.readiness.status == "NOT_READY"
    assert json.loads((exported.path / "package.json").read_text())["quality_score"] is None


def test_not_measured_and_not_finite_are_never_met():
    for value in (None, float("nan"), float("inf"), -float("inf")):
        for direction in (Direction.AT_LEAST, Direction.AT_MOST, Direction.EQUAL):
            assert not judge("x", value, 0.0, direction, "1").met
    assert judge("x", 1.0, 1.0, Direction.AT_LEAST, "1").met
    assert not judge("x", 0.999, 1.0, Direction.AT_LEAST, "1").met
    assert not judge("x", 1.001, 1.0, Direction.AT_MOST, "1").met


def test_totals_are_those_of_the_file_system(package, tmp_path):
    other = shutil.copytree(package, tmp_path / "other")
    edit(other, "package.json", lambda m: m.update(name="other", quality_score=0.5))
    manifest = Phase6Preparer().bake_manifest([package, other], tmp_path / "baking.json")
    files = [p for d in (package, other) for p in d.rglob("*") if p.is_file()]
    assert manifest.total_bytes == sum(os.stat(p).st_size for p in files)
    assert sum(len(p.files) for p in manifest.packages) == len(files)
    assert manifest.quality_range == (0.5, manifest.packages[0].quality_score)
    assert read_baking_manifest(tmp_path / "baking.json") == manifest
    text = (tmp_path / "baking.json").read_text()
    (tmp_path / "baking.json").write_text('{"packages":[],' + text[1:])
    with pytest.raises(DamagedCheckpointError, match="key 'packages' is there twice"):
        read_baking_manifest(tmp_path / "baking.json")
    stored = json.loads(text)
    stored["totals"]["bytes"] += 1
    (tmp_path / "baking.json").write_text(json.dumps(stored))
    with pytest.raises(DamagedCheckpointError, match="totals"):
        read_baking_manifest(tmp_path / "baking.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(status="MAYBE"),
        lambda p: p.update(quality_score="0.9"),
        lambda p: p.update(name="../model"),
        lambda p: p["files"][0].update(path="../../etc/passwd"),
        lambda p: p["files"][0].update(sha256="0"),
        lambda p: (p["files"][0].update(bytes=-1), p["files"][1].update(bytes=0)),
    ],
)
def test_a_manifest_of_what_no_package_has_is_not_read(package, tmp_path, change):
    manifest = tmp_path / "baking.json"
    Phase6Preparer().bake_manifest([package], manifest)
    stored = json.loads(manifest.read_text())
    (entry,) = stored["packages"]
    change(entry)
    size = sum(file["bytes"] for file in entry["files"])
    entry["bytes"] = stored["totals"]["bytes"] = stored["totals"]["average_bytes"] = size
    stored["totals"]["ready"] = int(entry["status"] == "READY")
    stored["totals"]["quality_range"] = [entry["quality_score"]] * 2
    manifest.write_text(json.dumps(stored))
    with pytest.raises(DamagedCheckpointError, match="no sound baking manifest"):
        read_baking_manifest(manifest)


def test_a_manifest_names_a_package_once(package, tmp_path):
    manifest = tmp_path / "baking.json"
    Phase6Preparer().bake_manifest([package], manifest)
    stored = json.loads(manifest.read_text())
    stored["packages"] *= 2
    for key in ("packages", "ready", "bytes"):
        stored["totals"][key] *= 2
    manifest.write_text(json.dumps(stored))
    with pytest.raises(DamagedCheckpointError, match="two of its packages have one name"):
        read_baking_manifest(manifest)


def test_a_fleet_without_a_member_is_none(tmp_path):
    """It was the eight reference models, trained one after the other."""
    with pytest.raises(CheckpointError, match="No package was named"):
        export_fleet(tmp_path, Phase6Preparer(), members=(), steps=1)
    assert not list(tmp_path.iterdir())


def test_a_fleet_of_doubles_or_of_nothing_is_refused(package, tmp_path):
    with pytest.raises(CheckpointError, match="Two packages are named 'model'"):
        Phase6Preparer().bake_manifest([package, package], tmp_path / "b.json")
    with pytest.raises(CheckpointError, match="No package"):
        Phase6Preparer().bake_manifest([], tmp_path / "b.json")
    (package / "model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        Phase6Preparer().bake_manifest([package], tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_the_manifest_lies_beside_the_directories_it_names(package, tmp_path):
    with pytest.raises(CheckpointError, match=r"Package 'model' is at .* looks for it at"):
        Phase6Preparer().bake_manifest([package], tmp_path / "elsewhere" / "b.json")
    moved = shutil.copytree(package, tmp_path / "moved")
    with pytest.raises(CheckpointError, match="Package 'model' is at"):
        Phase6Preparer().bake_manifest([moved], tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    "change",
    [{"quality_score": 1.5}, {"name": 5}, {"name": "a\0"}, {"readiness": {"status": "FINE"}}],
)
def test_a_description_that_is_none_is_not_baked(package, tmp_path, change):
    edit(package, "package.json", lambda m: m.update(change))
    with pytest.raises(CheckpointError, match="is no export package"):
        Phase6Preparer().bake_manifest([package], tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_a_handoff_arrives_whole_and_once(package, tmp_path):
    preparer = Phase6Preparer()
    first = preparer.hand_off(package, tmp_path / "inbox")
    assert (first.state, tree_digest(first.path)) == ("handed off", tree_digest(package))
    assert preparer.hand_off(package, tmp_path / "inbox").state == "already there"
    preparer.verify_handoff(tmp_path / "inbox", "model", first.digest)
    edit(first.path, "lineage.json", lambda m: m.update(source="another"))
    with pytest.raises(CheckpointError, match="another package"):
        preparer.verify_handoff(tmp_path / "inbox", "model", first.digest)
    with pytest.raises(CheckpointError, match="another package"):
        preparer.hand_off(package, tmp_path / "inbox")
    with pytest.raises(CheckpointError, match="is not there"):
        preparer.verify_handoff(tmp_path / "inbox", "gone", first.digest)


def test_a_package_is_not_handed_off_into_itself(package):
    """It was copied into its own copy until no path was long enough."""
    before = sorted(package.rglob("*"))
    for inbox in (package, package / "inbox"):
        with pytest.raises(CheckpointError, match=r"inside the source|source and destination"):
            Phase6Preparer().hand_off(package, inbox)
    assert sorted(package.rglob("*")) == before


def test_what_only_looks_like_the_package_is_not_there_already(package, tmp_path):
    """A digest over a tree follows links, and passes over what is no file."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "model").symlink_to(package)
    with pytest.raises(CheckpointError, match="is there and is another package"):
        Phase6Preparer().hand_off(package, inbox)
    (inbox / "model").unlink()
    shutil.copytree(package, inbox / "model")
    (inbox / "model" / "link").symlink_to("nowhere")
    with pytest.raises(DamagedCheckpointError, match="is a symbolic link"):
        Phase6Preparer().hand_off(package, inbox)


def test_what_is_there_already_is_judged_all_the_same(package, tmp_path):
    """It came under other limits, or was put there by hand."""
    inbox = tmp_path / "inbox"
    shutil.copytree(package, inbox / "model")
    preparer = Phase6Preparer(evaluate=lambda task, path: {"accuracy": 0.5, "loss": 1.0})
    with pytest.raises(NotReadyError, match=r"accuracy is 0\.5, required"):
        preparer.hand_off(package, inbox)
    assert tree_digest(inbox / "model") == tree_digest(package)


@pytest.mark.parametrize("told", [2**60, float("nan"), "\udc80"])
def test_lineage_that_is_no_json_is_refused(tmp_path, told):
    with pytest.raises(CheckpointError, match=r"lineage\.json cannot hold what it is told"):
        Phase6Preparer().export(FROZEN, tmp_path / "model", lineage={"seed": told})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_export_or_handoff_leaves_nothing(call, package, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    inbox = tmp_path / "inbox"
    inbox.mkdir()
    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            Phase6Preparer().hand_off(package, inbox)
        with pytest.raises(CheckpointError, match="Input/output error"):
            Phase6Preparer().export(FROZEN, tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inbox", "model"]
    assert list(inbox.iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "", "a/b", "..", "a\0b", "a\nb"])
def test_a_name_leads_nowhere_else(name, package, tmp_path):
    edit(package, "package.json", lambda m: m.update(name=name))
    with pytest.raises(CheckpointError, match="no usable name"):
        Phase6Preparer().hand_off(package, tmp_path / "inbox")


def test_nothing_is_exported_under_a_name_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="'a/b' is no name of a package"):
        Phase6Preparer().export(FROZEN, tmp_path / "model", name="a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'{"accuracy":{"unit":"1","value":0.1},', "key 'accuracy' is there twice"),
        (b'{"extra":{"value":NaN},', "holds NaN"),
        (b'{"extra":1e999,', "beyond float64"),
        (b'{"extra":' + b"[" * 100_000 + b"]" * 100_000 + b",", "deeper"),
    ],
    ids=["twice", "NaN", "infinite", "deep"],
)
def test_what_two_readers_take_differently_is_damaged(package, tmp_path, said, why):
    file = package / "metrics.json"
    file.write_bytes(said + file.read_bytes()[1:])
    write_manifest(package)
    for act in (Phase6Preparer().assess, lambda p: Phase6Preparer().hand_off(p, tmp_path / "in")):
        with pytest.raises(DamagedCheckpointError, match=why):
            act(package)
    assert not (tmp_path / "in").exists()


def test_a_directory_in_place_of_a_description_is_damaged(package):
    (package / "metrics.json").unlink()
    (package / "metrics.json").mkdir()
    (package / "metrics.json" / "x").touch()
    write_manifest(package)
    with pytest.raises(
        DamagedCheckpointError, match=r"metrics\.json is damaged: it cannot be read"
    ):
        Phase6Preparer().assess(package)


@pytest.mark.parametrize("claim", [None, "0.98", True, [0.98], 10**400])
def test_a_claim_that_is_no_finite_number_is_not_ready(package, tmp_path, claim):
    edit(package, "metrics.json", lambda m: m["accuracy"].update(value=claim))
    readiness = Phase6Preparer().assess(package)
    assert [criterion.name for criterion in readiness.blocking] == ["claimed_metrics"]
    with pytest.raises(NotReadyError):
        Phase6Preparer().hand_off(package, tmp_path / "inbox")
    assert not (tmp_path / "inbox").exists() or not list((tmp_path / "inbox").iterdir())


def test_nothing_is_staged_inside_the_source_whose_digest_is_recorded(tmp_path):
    """The digest was over the stage as well, whose name nobody knows afterwards."""
    source = shutil.copytree(FROZEN, tmp_path / "source")
    with pytest.raises(CheckpointError, match="lies inside the source"):
        Phase6Preparer().export(source, source / "package")
    assert tree_digest(source) == tree_digest(FROZEN)


@pytest.mark.parametrize("fact", ["source_digest", "task", "data_digest"])
def test_what_an_export_finds_out_is_not_told_otherwise(fact, package, tmp_path):
    """Lineage taken over from another package said that this one was made of its source."""
    told = {fact: json.loads((package / "lineage.json").read_text())[fact]}
    with pytest.raises(CheckpointError, match=f"told '{fact}', which the export finds out itself"):
        Phase6Preparer().export(FROZEN, tmp_path / "next", lineage=told)
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("task", [["x"], 5])
def test_a_recorded_task_that_is_no_name_is_refused(task, tmp_path):
    convert(FROZEN, tmp_path / "source", "hf-packed")
    config = tmp_path / "source" / "config.json"
    document = json.loads(config.read_text())
    document["forge_harness"]["extras"]["task"] = task
    config.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"records task .*; expected a task's name"):
        Phase6Preparer().export(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [("mnist", "Task 'mnist' was asked for"), ("digits#mine", "Unknown variant of digits 'mine'")],
)
def test_a_recorded_task_without_data_here_is_not_measured(task, said, tmp_path):
    """The name was nobody's choice: it ended in "Unknown task", not ready allowed or not."""
    source = shutil.copytree(FROZEN, tmp_path / "source")
    edit(source, "forge.json", lambda document: document["extras"].update(task=task))
    with pytest.raises(NotReadyError, match=f"accuracy is not measured.*{said}"):
        Phase6Preparer().export(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    exported = Phase6Preparer().export(source, tmp_path / "model", allow_not_ready=True)
    lineage = json.loads((exported.path / "lineage.json").read_text())
    assert (lineage["task"], lineage["data_digest"]) == (task, None)
    with pytest.raises(NotReadyError, match=f"accuracy is not measured.*{said}"):
        Phase6Preparer().hand_off(exported.path, tmp_path / "inbox")
    untold = fixtures_dir() / "checkpoints" / "hf-packed-sharded"
    with pytest.raises(UsageError, match="Unknown task 'digts'"):
        Phase6Preparer().export(untold, tmp_path / "told", task="digts")


@pytest.mark.parametrize(
    ("classes", "status"),
    [(None, "NOT_READY"), (lambda task: False, "READY"), (lambda task: True, "NOT_READY")],
    ids=["unknown", "text", "classes"],
)
def test_a_task_of_classes_has_a_limit_of_accuracy_without_labels_too(package, classes, status):
    """What tells no classes is a family of language models, not a package that lacks a file."""
    (package / "labels.json").unlink()
    said = json.loads((package / "metrics.json").read_text(encoding="utf-8"))
    metrics = {name: row["value"] for name, row in said.items()} | {"accuracy": 0.5}
    said["accuracy"]["value"] = 0.5
    (package / "metrics.json").write_text(json.dumps(said), encoding="utf-8")
    (package / MANIFEST).unlink()
    write_manifest(package)
    found = Phase6Preparer(evaluate=lambda task, path: metrics, classes=classes).assess(package)
    assert {c.name: c.met for c in found.criteria}["accuracy"] == (status == "READY")
