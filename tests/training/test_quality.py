from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from forge_harness.errors import UsageError
from forge_harness.protocols import TrainOptions
from forge_harness.training import (
    PackageError,
    QATSession,
    data_info,
    export_package,
    quality,
    quality_plan,
    quality_run,
)
from forge_harness.training.evaluation import Evaluation
from forge_harness.training.quality import BLOCKS, STUDIES, Study


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, ("digits", "quick"), Study(seeds=2, steps=46))
    monkeypatch.setitem(STUDIES, ("bytes", "quick"), Study(seeds=1, steps=2))


def test_plan_lists_both_arms_dearest_first() -> None:
    plan = quality_plan("quick")
    assert len(plan) == len(set(plan))
    assert plan[0] == ("bytes", "full", 0)
    assert {arm for _, arm, _ in plan} == {"full", "ternary"}
    by_arm = {arm: sorted((t, s) for t, a, s in plan if a == arm) for arm in ("full", "ternary")}
    assert by_arm["full"] == by_arm["ternary"]


def test_a_larger_profile_trains_no_less() -> None:
    def trained(profile: str) -> Counter[tuple[str, str]]:
        steps: Counter[tuple[str, str]] = Counter()
        for task, arm, _ in quality_plan(profile):
            steps[task, arm] += STUDIES[task, profile].steps
        return steps

    quick, full, nightly = (trained(profile) for profile in ("quick", "full", "nightly"))
    assert quick < full < nightly


@pytest.mark.usefixtures("short")
def test_arms_share_blocks_and_training_beats_the_control() -> None:
    full, control = quality_run("digits", "full", 6, "quick")
    (ternary,) = quality_run("digits", "ternary", 6, "quick")
    assert (full.arm, control.arm, ternary.arm) == ("full", "post_training", "ternary")
    assert full.block_size == control.block_size == ternary.block_size
    assert len(ternary.block_size) == BLOCKS["digits"]
    assert sum(ternary.block_size) == data_info("digits#1").validation_size
    for run in (full, control, ternary):
        assert run.accuracy == sum(run.block_correct) / sum(run.block_size)
        assert run.data_digest == data_info("digits#1").digest
        assert run.task == "digits"
        assert run.finite
    assert ternary.accuracy > control.accuracy + 0.05
    assert 0 < 4.2 * ternary.package_bytes < ternary.full_precision_bytes
    # Both files have the same header but for the names of the dtypes and the offsets.
    assert 1.9 < ternary.full_precision_bytes / ternary.bf16_bytes < 2
    assert len(ternary.curve) <= 100
    assert ternary.curve[-1][0] == 45
    assert ternary.curve[-1][2] == ternary.accuracy


@pytest.mark.usefixtures("short")
def test_quick_profile_trains_the_small_language_model() -> None:
    (run,) = quality_run("bytes", "ternary", 0, "quick")
    assert run.parameters == 459_392
    assert len(run.block_correct) == BLOCKS["bytes"]


@pytest.mark.usefixtures("short")
def test_run_that_meets_nan_says_so() -> None:
    def loss(model, batch):
        return model(batch.inputs).sum() * float("nan")

    (run,) = quality_run("digits", "ternary", 0, "quick", loss=loss)
    assert not run.finite
    assert run.steps == 0
    assert run.curve == ()


def test_size_is_that_of_every_file_of_the_package(tmp_path: Path) -> None:
    session = QATSession("digits", TrainOptions(steps=1))
    export_package(session, tmp_path)
    sizes = [os.stat(tmp_path / name).st_size for name in os.listdir(tmp_path)]
    assert len(sizes) == 3
    assert quality._package_bytes(session, finite=True) == sum(sizes)


def test_run_with_nan_in_its_weights_has_no_package() -> None:
    session = QATSession("digits", TrainOptions(steps=1))
    with torch.no_grad():
        session.model.head.weight[0] = float("nan")
    assert quality._package_bytes(session, finite=False) == 0
    with pytest.raises(PackageError, match="'head' has scales"):
        quality._package_bytes(session, finite=True)


def test_control_has_no_run_of_its_own() -> None:
    with pytest.raises(UsageError, match="comes with the 'full' run"):
        quality_run("digits", "post_training", 0, "quick")


def test_blocks_keep_order_and_count() -> None:
    result = Evaluation(0.0, correct=(1, 2, 3, 4, 5), predictions=(5, 5, 5, 5, 5))
    assert result.blocks(2) == ((3, 12), (10, 15))
    assert result.accuracy == 15 / 25


def test_marks_end_with_the_last_step() -> None:
    assert quality._marks(300, 10) == set(range(29, 300, 30))
    assert 2 in quality._marks(3, 10)
