"""`Phase4Connector`: what it reads, what it refuses, and the matrix it measures."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from forge_harness import Phase4Connector
from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.formats import WriteOptions
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.native import write_native
from forge_harness.integration import phase4_connector
from forge_harness.integration.compatibility import (
    compatibility_json,
    measure,
    reference_cases,
)
from forge_harness.integration.metrics_sync import read_targets
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import TrainOptions
from forge_harness.training.start import ulps

MODELS = fixtures_dir() / "models"
GOLDEN = fixtures_dir() / "checkpoints"
TRUTH = json.loads((MODELS / "truth.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["v1.0", "v0.9", "custom"])
def test_loading_finds_the_frozen_codes(kind):
    loaded = Phase4Connector().load(MODELS / kind)
    assert {n: w.codes_sha256 for n, w in loaded.ternary.items()} == TRUTH["codes_sha256"]
    scales = {n: w.scales[0].hex() for n, w in loaded.ternary.items()}
    for name, scale in TRUTH["scales"].items():
        assert ulps(float.fromhex(scales[name]), float.fromhex(scale)) <= 1
    assert loaded.model.family == "digits"


def test_a_model_of_other_sizes_has_no_task_and_starts_no_training():
    """Training began, and ended with the shapes of a product that does not exist."""
    path = GOLDEN / "native-digits"
    assert Phase4Connector().configure_qat(path).task is None
    assert Phase4Connector().configure_qat(MODELS / "v1.0").task == "digits"
    with pytest.raises(CheckpointError, match="its model has inputs 16"):
        Phase4Connector().start_session(path, TrainOptions(steps=1))


def test_the_matrix_says_what_each_kind_costs():
    rows = {row.model_type: row for row in Phase4Connector().compatibility()}
    assert [row.conversion for row in rows.values()] == ["No", "Minor", "Yes", "Auto-detect"]
    assert all(row.codes_changed == 0 for row in rows.values())
    for label in ("BitNet v1.0", "BitNet v0.9", "Custom BitNet"):
        assert rows[label].impact == 0
    # Import without training costs this model a tenth of its accuracy, and that is said.
    assert 0.05 < rows["Legacy Models"].impact < 0.2
    assert compatibility_json(list(rows.values()))[2]["impact"] == rows["Legacy Models"].impact


def test_a_wrong_scale_shows_in_the_matrix(tmp_path):
    case = next(c for c in reference_cases() if c.model_type == "Custom BitNet")
    directory = shutil.copytree(case.path, tmp_path / "swapped")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "autobitlinear"
    (directory / "config.json").write_text(json.dumps(config))
    row = measure(dataclasses.replace(case, path=directory))
    assert row.scale_change > 1
    assert row.codes_changed == 0


def test_training_starts_from_codes_and_scales():
    session = Phase4Connector().start_session(MODELS / "v0.9", TrainOptions(steps=3))
    with open_checkpoint(MODELS / "v0.9") as opened:
        for name in opened.ternary_names():
            stored = opened.ternary(name)
            values = session.model.get_submodule(name.removesuffix(".weight")).effective_weight()
            assert torch.equal(values.sign().to(torch.int8), stored.codes())
            assert ulps(float(values.abs().max()), float(stored.scales[0])) <= 1
    assert session.evaluate()["accuracy"] == pytest.approx(TRUTH["ternary_accuracy"], abs=1e-9)
    assert session.step().loss < 0.1


def test_a_family_without_a_task_is_refused_with_the_remedy():
    with pytest.raises(CheckpointError, match="training starts from digits or byte-lm"):
        Phase4Connector().start_session(GOLDEN / "hf-online", TrainOptions())


def test_configuration_tells_where_latents_come_from():
    stored = Phase4Connector().configure_qat(GOLDEN / "hf-online")
    made = Phase4Connector().configure_qat(GOLDEN / "native")
    assert (stored.latents, stored.granularity, stored.task) == ("stored", "tensor", None)
    assert (made.latents, made.granularity) == ("made", "part")
    assert "embedding.weight" in made.excluded


def test_targets_travel_with_the_package(tmp_path):
    with open_checkpoint(GOLDEN / "native") as opened:
        target = {"value": 0.9, "unit": "1", "direction": "at_least"}
        package = tmp_path / "package"
        package.mkdir()
        write_native(opened, package, WriteOptions(), extras={"targets": {"accuracy": target}})
    connector = Phase4Connector()
    targets = connector.load(package).targets
    (row,) = connector.sync_metrics(targets, {"accuracy": (0.95, "1")})
    assert (row.state, row.target, row.measured) == ("met", 0.9, 0.95)


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (10**400, "missed"),
        (torch.ones(2), "not measured"),
        (torch.tensor(True), "not measured"),
        (torch.tensor(0.95), "met"),
    ],
)
def test_what_is_no_number_is_not_measured(value, state):
    targets = read_targets({"targets": {"a": {"value": 0, "unit": "1", "direction": "at_least"}}})
    (row,) = Phase4Connector().sync_metrics(targets, {"a": (value, "1")})
    assert row.state == state


def test_a_target_no_number_reaches_is_refused():
    target = {"value": 10**400, "unit": "1", "direction": "at_most"}
    with pytest.raises(CheckpointError, match="expected a finite number"):
        read_targets({"targets": {"a": target}})


@pytest.mark.parametrize(
    "targets", [[], {"a": 1}, {"a": {"value": "x", "unit": "1", "direction": "at_least"}}]
)
def test_targets_that_are_none_are_refused(targets, tmp_path):
    with open_checkpoint(GOLDEN / "native") as opened:
        package = tmp_path / "package"
        package.mkdir()
        write_native(opened, package, WriteOptions(), extras={"targets": targets})
    with pytest.raises(CheckpointError, match=r"[Tt]arget"):
        Phase4Connector().load(package)


def test_a_source_that_changes_is_noticed(tmp_path, monkeypatch):
    source = shutil.copytree(GOLDEN / "native", tmp_path / "source")
    real = phase4_connector.open_checkpoint

    def touching(path, options=None):
        opened = real(path, options)
        (path / "new").write_text("x")
        return opened

    monkeypatch.setattr(phase4_connector, "open_checkpoint", touching)
    with pytest.raises(DamagedCheckpointError, match="changed while it was read"):
        Phase4Connector().load(source)
