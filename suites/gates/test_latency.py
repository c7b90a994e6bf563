"""The latency gate: what a user of the served model waits for."""

import pytest

from forge_harness.errors import several


@pytest.mark.forge_timing
@pytest.mark.forge_check("gates.latency")
def test_latency(served_load, policy, evidence):
    """The median response at base load keeps the gate, through the server and open loop."""
    phase = served_load["phases"][0]
    if problems := [*phase["problems"], *served_load["reconciliation"]["problems"]]:
        pytest.skip(f"INVALID load: {problems[0]}")
    found = next(found for found in phase["response"] if found["name"] == "p50")
    if found["state"] == "too_few":
        pytest.skip(f"the median was not measured: {found['state']}")
    evidence.at_most(
        "latency",
        # Of requests half of which were never answered it is over any limit.
        float("inf") if found["state"] == "no_answer" else found["value_s"],
        limit=policy.threshold("gates.latency.at_most"),
        unit="s",
        reason=f"median of {several(found['count'], 'request')} at base load",
    )
