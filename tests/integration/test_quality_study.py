"""The quality study: what a subject may return, and what is said when it is something else."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from forge_harness.integration.quality_study import StudyError, obtain_study, read_study

SUBJECTS = """
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from forge_harness.protocols import QualityRun

RUN = QualityRun(
    task="digits", arm="full", seed=0, steps=2, learning_rate=0.1, parameters=3, accuracy=0.5,
    loss=0.25, block_correct=(1,), block_size=(2,), curve=((1, 0.5, -1.0),), finite=True,
    seconds=1.0, peak_rss_bytes=4, data_digest="sha256:00",
)


class Fixed:
    plan = [("digits", "full", 0)]
    runs = [RUN]

    def quality_plan(self, profile):
        return self.plan

    def quality_run(self, task, arm, seed, profile):
        return self.runs


class Scalars(Fixed):
    plan = [("digits", "full", np.int64(0))]
    runs = [
        replace(
            RUN,
            accuracy=np.float32(0.5),
            loss=torch.tensor(0.25),
            block_correct=(np.int64(1),),
            finite=np.bool_(True),
        )
    ]


class NoPlan(Fixed):
    plan = []


class ShortPlan(Fixed):
    plan = [("digits", "full")]


class Nothing(Fixed):
    runs = None


class Dictionaries(Fixed):
    runs = [{"accuracy": 1.0}]


class Functions(Fixed):
    runs = [replace(RUN, accuracy=lambda: 1)]


class Loads(Fixed):
    def quality_run(self, task, arm, seed, profile):
        loader = DataLoader(range(3), num_workers=1, worker_init_fn=lambda worker: None)
        return [replace(RUN, steps=sum(int(batch) for batch in loader))]
"""


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    file = tmp_path / "subjects.py"
    file.write_text(SUBJECTS)
    return file


def test_numbers_of_numpy_and_torch_are_numbers(subjects: Path, tmp_path: Path) -> None:
    (expected,) = obtain_study(f"{subjects}:Fixed", "quick", tmp_path / "fixed.json", workers=1)
    (run,) = obtain_study(f"{subjects}:Scalars", "quick", tmp_path / "study.json", workers=1)
    assert run == expected
    assert type(run.accuracy) is float
    assert read_study(tmp_path / "study.json") == [expected]


@pytest.mark.skipif(
    multiprocessing.get_context().get_start_method() != "fork",
    reason="a function without a name can be given to processes that are forked only",
)
def test_workers_of_a_run_start_as_they_do_elsewhere(subjects: Path, tmp_path: Path) -> None:
    """Not as those of the study do, which cannot be given a lambda."""
    (run,) = obtain_study(f"{subjects}:Loads", "quick", tmp_path / "study.json", workers=1)
    assert run.steps == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoPlan", r"quality_plan\('quick'\) of the subject names no run"),
        ("ShortPlan", r"has an entry \('digits', 'full'\); expected \(task, arm, seed\)"),
        ("Nothing", "digits full seed 0 raised TypeError"),
        ("Dictionaries", "returned a dict; expected QualityRun"),
        ("Functions", "holds a function; expected numbers and text"),
    ],
)
def test_what_is_no_study_is_said(subjects: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        obtain_study(f"{subjects}:{name}", "quick", tmp_path / "study.json", workers=1)
    assert not (tmp_path / "study.json").exists()
