"""Resumption and repetition are held to what another process makes of the files alone."""

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .process_defects import (
    AverageNotSaved,
    ExportsInitialGains,
    HashSeed,
    MomentsInMemory,
    SessionsInMemory,
)

DEFECTS = {
    "C01_moments_in_process_memory": (
        "resume_bit_identical",
        MomentsInMemory(),
        "other_process.first_different_step",
    ),
    "C01_sessions_in_process_memory": (
        "resume_bit_identical",
        SessionsInMemory(),
        "other_process_error is KeyError",
    ),
    "V05_hash_seed": ("repeat_bit_identical", HashSeed(), "other_process.sample_ids"),
    "C08_average_not_saved": ("resume_bit_identical", AverageNotSaved(), "metrics_at_once"),
    "C08_average_not_saved_twice": ("resume_twice_bit_identical", AverageNotSaved(), "metrics"),
    "E10_exports_what_it_was_built_with": (
        "resume_bit_identical",
        ExportsInitialGains(),
        "other_process.different_files",
    ),
}


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"training.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith(reason), result.reason


@pytest.mark.parametrize("check", ["repeat_bit_identical", "resume_bit_identical"])
def test_a_subject_loaded_by_its_name_is_loaded_by_it_there(run_check, tmp_path, check):
    file = tmp_path / "mine.py"
    file.write_text(
        "from forge_harness.subject.reference import ReferenceSubject\n"
        "class Mine(ReferenceSubject):\n"
        "    def __init__(self):\n"
        "        self.kept = lambda: None\n"
    )
    result = run_check(f"training.{check}", arguments=("--forge-subject", f"{file}:Mine"))
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("other_process") == "used"


class Unsendable(ReferenceSubject):
    def __init__(self):
        self.kept = lambda: None


def test_a_subject_that_cannot_be_sent_is_said_to_be_compared_here_only(run_check):
    result = run_check("training.resume_bit_identical", Unsendable())
    assert result.outcome is Outcome.PASS, result.reason
    assert "pickling the subject raised" in result.evidence("other_process")
