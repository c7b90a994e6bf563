"""Security, hostile_model_refused: red for readers that run, believe or follow what they read."""

from __future__ import annotations

import pytest

from forge_harness.drill.defects import all_defects
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
