"""Training under a tracker, and a registry that gives back what it was given."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from forge_harness import MLOpsCoordinator, Phase6Preparer, QualityCoordinator, load_policy
from forge_harness.canonical import tree_digest
from forge_harness.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ForgeError,
    RegistryError,
    UsageError,
)
from forge_harness.formats.manifest import write_manifest
from forge_harness.integration import experiments
from forge_harness.integration.experiments import StepLog
from forge_harness.model import ByteLM, ByteLMConfig
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.training import TrainingInterrupted, train_to_directory

SOUND = fixtures_dir() / "models" / "v1.0"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Phase6Preparer().export(SOUND, tmp_path_factory.mktemp("export") / "digits").path


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a small language model."""
    folder = tmp_path_factory.mktemp("language")
    options = TrainOptions(steps=2, batch_size=2)
    config = ByteLMConfig(width=32, heads=2, hidden=32, layers=1)
    train_to_directory(
        "bytes", folder / "run", options, build_model=lambda *_: ByteLM(config), checkpoint_every=2
    )
    package = Phase6Preparer().export(folder / "run", folder / "text", allow_not_ready=True)
    assert [found.name for found in package.readiness.blocking] in ([], ["compression_ratio"])
    return package.path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that is made already, to be copied: making one takes two seconds."""
    root = tmp_path_factory.mktemp("mlops") / "root"
    with MLOpsCoordinator(root) as made, pytest.raises(RegistryError):
        made.run("none")
    return root


@pytest.fixture
def coordinator(empty: Path, tmp_path: Path):
    with MLOpsCoordinator(shutil.copytree(empty, tmp_path / "mlops")) as opened:
        yield opened


def changed(package: Path, target: Path, **metrics: object) -> Path:
    copy = shutil.copytree(package, target)
    file = copy / "metrics.json"
    stated = json.loads(file.read_text()) | metrics
    file.write_text(json.dumps(stated))
    (copy / "manifest.json").unlink()
    write_manifest(copy)
    return copy


def test_a_training_is_tracked(coordinator: MLOpsCoordinator, tmp_path: Path) -> None:
    options = TrainOptions(steps=6, seed=3)
    run = coordinator.train("digits", options, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert run.status == "FINISHED"
    assert run.metrics == {"accuracy": written["accuracy"], "loss": written["loss"]}
    assert run.digest == tree_digest(tmp_path / "run" / "package")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    losses = [step["loss"] for step in steps]
    summary = coordinator.monitor(run.run_id)["loss"]
    assert (summary.count, summary.last) == (6, losses[-1])
    assert summary.mean == pytest.approx(sum(losses) / 6)
    deviation = math.sqrt(sum((x - summary.mean) ** 2 for x in losses) / 5)
    assert summary.deviation == pytest.approx(deviation)
    assert coordinator.run(run.run_id) == run


def test_a_training_that_fails_is_tracked_as_such(
    coordinator: MLOpsCoordinator, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ForgeError, match="not empty"):
        coordinator.train("digits", TrainOptions(steps=2), tmp_path / "run")
    (found,) = coordinator._tracker._client().search_runs(["1"])
    assert found.info.status == "FAILED"
    assert "not empty" in found.data.tags["forge.error"]


def test_a_version_comes_back_as_it_was_given(
    coordinator: MLOpsCoordinator, package: Path, tmp_path: Path
) -> None:
    given = coordinator.register(package, name="digits")
    fetched = coordinator.fetch("digits", 1, tmp_path / "out")
    assert fetched == given
    assert tree_digest(tmp_path / "out") == tree_digest(package) == given.digest
    stated = json.loads((package / "metrics.json").read_text())
    assert given.metrics["accuracy"] == stated["accuracy"]["value"]
    assert given.lineage == json.loads((package / "lineage.json").read_text())


def test_another_process_reads_it(coordinator, package: Path, tmp_path: Path) -> None:
    coordinator.register(package, name="digits")
    code = (
        "import sys; from pathlib import Path; from forge_harness import MLOpsCoordinator\n"
        "with MLOpsCoordinator(sys.argv[1]) as opened:\n"
        "    print(opened.fetch('digits', 1, Path(sys.argv[2])).digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(coordinator.root), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == tree_digest(package) == tree_digest(tmp_path / "out")


def test_versions_are_kept_apart_and_aliases_move(coordinator, package, tmp_path) -> None:
    other = changed(package, tmp_path / "other", note="second")
    coordinator.register(package, name="digits")
    coordinator.register(other, name="digits")
    assert coordinator.promote("digits", 1).aliases == ("champion",)
    assert coordinator.promote("digits", 2).aliases == ("champion",)
    assert coordinator.version("digits", 1).aliases == ()
    coordinator.fetch("digits", "champion", tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(other) != tree_digest(package)


def test_a_version_that_was_changed_is_not_given_out(coordinator, package, tmp_path) -> None:
    coordinator.register(package, name="digits")
    file = next(coordinator.root.rglob("model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="not what was registered"):
        coordinator.fetch("digits", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_version_that_was_changed_is_not_promoted(coordinator, package, tmp_path, damage) -> None:
    """`champion` was moved to what nobody could fetch."""
    coordinator.register(package, name="digits")
    coordinator.register(changed(package, tmp_path / "next", loss={"value": 9.0}), name="digits")
    coordinator.promote("digits", 1)
    stored = coordinator._tracker.stored("digits", 2)
    (stored / "labels.json").unlink() if damage == "changed" else shutil.rmtree(stored)
    with pytest.raises(DamagedCheckpointError, match="Version 2 of 'digits' is not what was reg"):
        coordinator.promote("digits", 2)
    assert coordinator.version("digits", "champion").version == 1


def test_a_classifier_without_labels_keeps_its_limit(empty, package, tmp_path) -> None:
    shutil.copytree(package, tmp_path / "bare")
    (tmp_path / "bare" / "labels.json").unlink()
    poor = changed(tmp_path / "bare", tmp_path / "poor", accuracy={"value": 0.2, "unit": "1"})
    root = shutil.copytree(empty, tmp_path / "mlops")
    with MLOpsCoordinator(root, quality=QualityCoordinator(load_policy())) as coordinator:
        coordinator.register(poor, name="digits")
        with pytest.raises(RegistryError, match=r"gate accuracy: .* under its limit of"):
            coordinator.promote("digits", 1)


def test_a_registry_inside_the_package_is_refused(package, tmp_path) -> None:
    """Its database was in the package, which did not verify any more."""
    copy = shutil.copytree(package, tmp_path / "digits")
    with (
        MLOpsCoordinator(copy / "mlops") as coordinator,
        pytest.raises(CheckpointError, match="lies inside the source"),
    ):
        coordinator.register(copy, name="digits")
    assert not (copy / "mlops").exists()


def test_a_damaged_package_is_not_taken(coordinator, package, tmp_path) -> None:
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError):
        coordinator.register(copy, name="digits")
    with pytest.raises(RegistryError):
        coordinator.version("digits", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_not_taken(coordinator, package, tmp_path, value) -> None:
    broken = changed(package, tmp_path / "broken", loss={"value": value, "unit": "1"})
    with pytest.raises(DamagedCheckpointError, match="which is no JSON number"):
        coordinator.register(broken, name="digits")


@pytest.mark.parametrize("file", ["metrics.json", "lineage.json"])
def test_a_number_that_readers_round_differently_is_not_taken(
    coordinator, package, tmp_path, file
) -> None:
    copy = shutil.copytree(package, tmp_path / "copy")
    stated = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**stated, "seed": 2**53 + 1}))
    write_manifest(copy)
    with pytest.raises(RegistryError, match="a number that not every reader has"):
        coordinator.register(copy, name="digits")


def test_what_misses_a_gate_is_not_promoted(empty, package, tmp_path) -> None:
    poor = changed(package, tmp_path / "poor", accuracy={"value": 0.2, "unit": "1"})
    quality = QualityCoordinator(load_policy())
    root = shutil.copytree(empty, tmp_path / "mlops")
    with MLOpsCoordinator(root, quality=quality) as coordinator:
        coordinator.register(package, name="digits")
        coordinator.register(poor, name="digits")
        coordinator.promote("digits", 1)
        with pytest.raises(RegistryError, match="gate accuracy"):
            coordinator.promote("digits", 2)
        assert coordinator.version("digits", "champion").version == 1


def test_a_language_model_needs_an_accuracy_of_no_height(empty, language, tmp_path) -> None:
    """Export called it READY, and it could never be promoted: no text has 85 % sure next bytes."""
    assert json.loads((language / "metrics.json").read_text())["accuracy"]["value"] < 0.85
    unmeasured = shutil.copytree(language, tmp_path / "unmeasured")
    (unmeasured / "metrics.json").write_text('{"loss": {"value": 2.0, "unit": "nats"}}')
    (unmeasured / "manifest.json").unlink()
    write_manifest(unmeasured)
    quality = QualityCoordinator(load_policy())
    root = shutil.copytree(empty, tmp_path / "mlops")
    with MLOpsCoordinator(root, quality=quality) as coordinator:
        coordinator.register(language, name="text")
        coordinator.register(unmeasured, name="text")
        assert coordinator.promote("text", 1).aliases == ("champion",)
        with pytest.raises(RegistryError, match="gate accuracy is not measured"):
            coordinator.promote("text", 2)
    with MLOpsCoordinator(root, quality=quality, required=()) as coordinator:
        assert coordinator.promote("text", 1).aliases == ("champion",)
    told = MLOpsCoordinator(root, quality=quality, classes=lambda task: task == "bytes")
    with told as coordinator, pytest.raises(RegistryError, match=r"under its limit of 0\.85"):
        coordinator.promote("text", 1)


def test_one_text_is_no_list_of_gates(tmp_path) -> None:
    """It was taken letter by letter: gate 'a' is not measured."""
    with pytest.raises(UsageError, match=r"required is the text 'accuracy'; .*\('accuracy',\)"):
        MLOpsCoordinator(tmp_path / "mlops", required="accuracy")
    assert not (tmp_path / "mlops").exists()


def test_what_no_gate_was_asked_of_is_not_promoted(empty, package, tmp_path) -> None:
    """`acuracy` 0.05 was promoted: only metrics named as a gate were looked at."""
    misspelt = shutil.copytree(package, tmp_path / "misspelt")
    entries = {"acuracy": {"value": 0.05, "unit": "1"}, "loss": {"value": 1.0, "unit": "1"}}
    (misspelt / "metrics.json").write_text(json.dumps(entries))
    (misspelt / "manifest.json").unlink()
    write_manifest(misspelt)
    quality = QualityCoordinator(load_policy())
    root = shutil.copytree(empty, tmp_path / "mlops")
    with MLOpsCoordinator(root, quality=quality) as coordinator:
        coordinator.register(misspelt, name="digits")
        coordinator.register(package, name="digits")
        with pytest.raises(RegistryError, match=r"gate accuracy is not measured.*acuracy, loss"):
            coordinator.promote("digits", 1)
        assert coordinator.version("digits", 1).aliases == ()
    with (
        MLOpsCoordinator(root, quality=quality, required=("latency",)) as coordinator,
        pytest.raises(RegistryError, match="gate latency is not measured"),
    ):
        coordinator.promote("digits", 2)
    with MLOpsCoordinator(root, quality=quality, required=()) as coordinator:
        with pytest.raises(RegistryError, match=r"none of its metrics .* is one of the gates"):
            coordinator.promote("digits", 1)
        assert coordinator.promote("digits", 2).aliases == ("champion",)


def test_what_is_not_there_is_named(coordinator, package, tmp_path) -> None:
    coordinator.register(package, name="digits")
    with pytest.raises(RegistryError, match="digits"):
        coordinator.fetch("digit", 1, tmp_path / "out")
    with pytest.raises(RegistryError, match="1"):
        coordinator.fetch("digits", "champoin", tmp_path / "out")
    with pytest.raises(RegistryError, match="no run"):
        coordinator.run("nonesuch")
    with pytest.raises(RegistryError, match="no run"):
        coordinator.register(package, name="digits", run_id="nonesuch")


class Kept:
    def __init__(self) -> None:
        self.batches: list[list[tuple[str, float, int, int]]] = []

    def log(self, run_id, rows) -> None:
        self.batches.append(rows)


def test_steps_are_handed_over_in_batches_and_only_what_is_finite() -> None:
    kept = Kept()
    log = StepLog(kept, "r")
    for step in range(600):
        loss = math.nan if step == 7 else float(step)
        record = StepRecord(
            step=step,
            loss=loss,
            learning_rate=0.1,
            weight_decay=0.0,
            grad_norm=1.0,
            sample_ids=(),
            seconds=0.01,
        )
        log.add(record, 600)
    log.flush()
    assert all(len(rows) <= 1000 for rows in kept.batches)
    losses = [row for rows in kept.batches for row in rows if row[0] == "loss"]
    assert [row[3] for row in losses] == [step for step in range(600) if step != 7]


def test_importing_it_imports_no_tracker() -> None:
    code = (
        "import sys, forge_harness; forge_harness.MLOpsCoordinator('x'); "
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.sep
    )
    assert done.stdout == "False\n"


def test_a_gate_is_not_passed_in_another_unit(empty, package, tmp_path) -> None:
    percent = changed(package, tmp_path / "percent", accuracy={"value": 60.0, "unit": "%"})
    root = shutil.copytree(empty, tmp_path / "mlops")
    with MLOpsCoordinator(root, quality=QualityCoordinator(load_policy())) as coordinator:
        assert coordinator.register(percent, name="digits").units["accuracy"] == "%"
        with pytest.raises(RegistryError, match="in '%', its threshold in '1'"):
            coordinator.promote("digits", 1)
        assert coordinator.version("digits", 1).aliases == ()


def test_a_metric_without_a_value_is_not_taken(coordinator, package, tmp_path) -> None:
    broken = changed(package, tmp_path / "broken", loss={"unit": "nats"})
    with pytest.raises(RegistryError, match="'loss' without a value"):
        coordinator.register(broken, name="digits")


def test_registering_the_same_files_again_writes_over_nothing(
    coordinator, package, tmp_path, monkeypatch
) -> None:
    """A full disk in the middle of it would otherwise take what another version has."""
    coordinator.register(package, name="digits")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("copyfile", "copytree", "copyfileobj"):
        monkeypatch.setattr(shutil, name, full)
    coordinator.register(package, name="again")
    coordinator.fetch("digits", 1, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(package)


def test_a_copy_that_is_cut_short_registers_nothing(
    coordinator, package, tmp_path, monkeypatch
) -> None:
    def cut(source: Path, target: Path, **_: object) -> None:
        Path(target, "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", cut)
        with pytest.raises(RegistryError, match="No space left"):
            coordinator.register(package, name="digits")
    with pytest.raises(RegistryError):
        coordinator.version("digits", 1)
    assert not list(coordinator.root.rglob("half"))
    assert coordinator.register(package, name="digits").version == 1


@pytest.mark.parametrize("damage", ["changed", "added"])
def test_registering_again_heals_a_damaged_copy(coordinator, package, tmp_path, damage) -> None:
    coordinator.register(package, name="digits")
    stored = next(coordinator.root.rglob("model.safetensors"))
    (stored if damage == "changed" else stored.with_name("added")).write_bytes(b"x")
    coordinator.register(package, name="again")
    for name in ("digits", "again"):
        coordinator.fetch(name, 1, tmp_path / name)
        assert tree_digest(tmp_path / name) == tree_digest(package)


@pytest.mark.parametrize("alias", ["", "2", "latest", "v1", "a b"])
def test_an_alias_that_could_not_be_looked_up_is_refused(coordinator, package, alias) -> None:
    coordinator.register(package, name="digits")
    with pytest.raises(RegistryError, match="Alias"):
        coordinator.promote("digits", 1, alias=alias)
    assert coordinator.version("digits", 1).aliases == ()


def test_a_quote_in_a_name_is_a_letter(coordinator, package) -> None:
    coordinator.register(package, name="it's")
    with pytest.raises(RegistryError, match=r"Unknown version of \"it's\" 'champion'.*1"):
        coordinator.version("it's", "champion")


def test_a_lineage_the_tracker_cannot_hold_is_refused(coordinator, package, tmp_path) -> None:
    copy = shutil.copytree(package, tmp_path / "copy")
    (copy / "lineage.json").write_text(json.dumps({"recipe": "x" * 200_000}))
    (copy / "manifest.json").unlink()
    write_manifest(copy)
    with pytest.raises(RegistryError, match=r"Lineage of .* at most 100,000"):
        coordinator.register(copy, name="digits")


def test_a_root_the_database_could_not_be_in_is_refused(tmp_path) -> None:
    with (
        MLOpsCoordinator(tmp_path / "what?") as coordinator,
        pytest.raises(RegistryError, match="'\\?'"),
    ):
        coordinator.run("none")
    assert not list(tmp_path.iterdir())


def no_database(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_another_mlflow(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (no_database, "file is not a database"),
        (cut_short, "malformed"),
        (of_another_mlflow, "found version ffffffffffff"),
        (directory, "unable to open database file"),
    ],
)
def test_a_registry_that_cannot_be_opened_is_a_sentence(
    empty, package, tmp_path, damage, why
) -> None:
    """They were tracebacks, no run of that name, or a hundred seconds of silence."""
    root = shutil.copytree(empty, tmp_path / "mlops")
    damage(root / "mlflow.db")
    with MLOpsCoordinator(root) as coordinator:
        for act in (
            lambda: coordinator.run("none"),
            lambda: coordinator.version("digits", 1),
            lambda: coordinator.register(package, name="digits"),
        ):
            with pytest.raises(RegistryError, match=rf"mlops' cannot be opened \(.*{why}"):
                act()


def test_a_database_that_another_process_locks_is_a_sentence(empty, tmp_path, monkeypatch) -> None:
    root = shutil.copytree(empty, tmp_path / "mlops")
    monkeypatch.setattr(experiments, "_LOCK_WAIT_S", 0.1)
    with closing(sqlite3.connect(root / "mlflow.db")) as other, MLOpsCoordinator(root) as late:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryError, match=r"cannot be opened \(database is locked\)"):
            late.version("digits", 1)


def test_a_database_damaged_in_use_is_a_sentence_and_nothing_else(coordinator, capfd) -> None:
    """MLflow wrote two tracebacks, and the sentence had the statement behind it."""
    with pytest.raises(RegistryError, match="There is no run 'none'"):
        coordinator.run("none")
    file = coordinator.root / "mlflow.db"
    found = file.read_bytes()
    # Bytes 24 to 27 count the changes: pages in memory are read again.
    file.write_bytes(found[:24] + b"\xff" * 4 + found[28:4096] + b"\xff" * (len(found) - 4096))
    with pytest.raises(RegistryError, match=r"^Run 'other' is refused: .*malformed$"):
        coordinator.run("other")
    assert not capfd.readouterr().err


def test_a_root_that_is_a_file_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        MLOpsCoordinator(tmp_path / "file") as coordinator,
        pytest.raises(RegistryError, match=r"cannot be opened \(.*Not a directory"),
    ):
        coordinator.run("none")


@pytest.mark.parametrize(
    ("statement", "act", "why"),
    [
        (
            "UPDATE model_version_tags SET value = 'ok' WHERE key = 'forge.metrics'",
            lambda coordinator, out: coordinator.promote("digits", 1),
            "tag forge.metrics 'ok', which is no JSON object",
        ),
        (
            "UPDATE model_version_tags SET value = '[0.9]' WHERE key = 'forge.metrics'",
            lambda coordinator, out: coordinator.version("digits", 1),
            "which is no JSON object",
        ),
        (
            "UPDATE model_versions SET source = 's3://bucket/model'",
            lambda coordinator, out: coordinator.fetch("digits", 1, out),
            "has its files at 's3://bucket/model'",
        ),
    ],
)
def test_a_version_of_another_make_is_a_sentence(
    coordinator, package, tmp_path, statement, act, why
) -> None:
    coordinator.register(package, name="digits")
    with closing(sqlite3.connect(coordinator.root / "mlflow.db")) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(RegistryError, match=re.escape(why)):
        act(coordinator, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_version_that_cannot_be_written_is_a_sentence(coordinator, package, tmp_path) -> None:
    coordinator.register(package, name="digits")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Cannot copy version 1 of 'digits' to .*file/out"):
        coordinator.fetch("digits", 1, tmp_path / "file" / "out")


def test_an_experiment_that_is_not_taken_is_a_sentence(coordinator, tmp_path) -> None:
    with pytest.raises(RegistryError, match="Experiment '' is refused"):
        coordinator.train("digits", TrainOptions(steps=1), tmp_path / "run", experiment="")
    assert not (tmp_path / "run").exists()


def test_a_training_that_was_interrupted_is_tracked_as_killed(
    coordinator, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(StepLog, "add", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted):
        coordinator.train("digits", TrainOptions(steps=5), tmp_path / "run")
    (found,) = coordinator._tracker._client().search_runs(["1"])
    assert found.info.status == "KILLED"


def test_processes_may_make_the_registry_side_by_side(tmp_path: Path, package: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from forge_harness import MLOpsCoordinator\n"
        "with MLOpsCoordinator(sys.argv[1]) as opened:\n"
        "    print(opened.register(Path(sys.argv[2]), name='digits').version)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mlops"), str(package)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert sorted(output.strip() for output, _ in ended) == ["1", "2", "3"]
