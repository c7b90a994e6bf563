"""MLPerf LoadGen on the same stalled server: two open loops that share no code agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forge_harness.load.driver import run_load

from . import support

CLIENT = Path(__file__).parent / "loadgen_client.py"
STALLED = ("--service-ms", 1, "--stall-at", 2, "--stall-s", 2)
RATE, SECONDS = 300, 7


def test_p95_through_a_stall_is_within_five_per_cent_of_loadgens(generator, tmp_path):
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen has no wheel for this platform")
    with support.serving(*STALLED) as theirs, support.serving(*STALLED) as ours:
        command = [sys.executable, str(CLIENT), theirs, str(RATE), str(SECONDS), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as oracle:
            plan = support.plan_of(ours, RATE, ((1, SECONDS),))
            report = run_load(generator, plan, tmp_path / "run")
            said = json.loads(oracle.communicate(timeout=30)[0])
    own = {p.share: p.value for p in report.phases[0].response}
    for share, name in ((0.95, "95.00"), (0.99, "99.00")):
        theirs_s = float(said[f"{name} percentile latency (ns)"]) / 1e9
        assert own[share] == pytest.approx(theirs_s, rel=0.05)
    # Both met the stall: a closed loop of a few users would show some 34 ms.
    assert own[0.95] > 1
