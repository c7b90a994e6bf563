"""Security, hostile_model_refused: red for readers that run, believe or follow what they read."""

from __future__ import annotations

import pytest

from forge_harness.drill.defects import all_defects
from forge_harness.errors import CheckpointError
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECK = "security.hostile_model_refused"
DEFECTS = [d for d in all_defects().values() if d.check == CHECK]


def test_the_reference_passes(run_check):
    run = run_check(CHECK, ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_an_unsafe_reader_is_found(run_check, defect):
    run = run_check(CHECK, defect.subject())
    assert run.outcome is Outcome.FAIL
    assert defect.shows in run.reason


class ReadsGguf:
    """Knows GGUF alone."""

    name = "gguf only"

    def read_checkpoint(self, path):
        if path.suffix != ".gguf" and not list(path.glob("*.gguf")):
            raise self.refusal(path)
        ReferenceSubject().read_checkpoint(path)

    def refusal(self, path):
        return CheckpointError(f"{path} is no GGUF.")


def test_a_reader_may_know_one_format(run_check):
    run = run_check(CHECK, ReadsGguf())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")
    assert run.evidence("sound_files_read") == 1


def test_what_a_reader_does_not_know_it_refuses_and_does_not_break_at(run_check):
    class Breaks(ReadsGguf):
        def refusal(self, path):
            return KeyError("model") if "legacy-pt" in str(path) else super().refusal(path)

    run = run_check(CHECK, Breaks())
    assert run.outcome is Outcome.FAIL
    assert "crashed is 1" in run.reason
    assert "sound legacy-pt" in run.reason
