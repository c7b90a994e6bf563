"""Integration, served_equals_trained: red for a reference server with one defect."""

from __future__ import annotations

import pytest

from forge_harness.drill.defects import all_defects
from forge_harness.types import Outcome

CHECK = "integration.served_equals_trained"
DEFECTS = [d for d in all_defects().values() if d.check == CHECK]


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_a_server_that_does_not_answer_as_the_model_is_found(run_check, defect):
    run = run_check(CHECK, defect.subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith(("wrong_alone is", "wrong_together is"))
    assert defect.shows in run.reason
