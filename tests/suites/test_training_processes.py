"""Resumption and repetition are held to what another process makes of the files alone."""

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


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
