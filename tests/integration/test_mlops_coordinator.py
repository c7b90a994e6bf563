"""Training under a tracker, and a registry that gives back what it was given."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forge_harness import MLOpsCoordinator, Phase6Preparer, QualityCoordinator, load_policy
from forge_harness.canonical import tree_digest
from forge_harness.errors import DamagedCheckpointError, ForgeError, RegistryError
from forge_harness.formats.manifest import write_manifest
from forge_harness.integration.experiments import StepLog
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import StepRecord, TrainOptions

SOUND = fixtures_dir() / "models" / "v1.0"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Phase6Preparer().export(SOUND, tmp_path_factory.mktemp("export") / "digits").path


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
    with pytest.raises(RegistryError, match="not finite"):
        coordinator.register(broken, name="digits")


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
