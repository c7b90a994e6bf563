"""MLPerf LoadGen as an oracle: on a server that stalls, its tail is ours."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from forge_harness.load.driver import run_load

from . import support

CLIENT = Path(__file__).parent / "loadgen_client.py"
RATE, SECONDS = 150.0, 10.0
STALL = ("--service-ms", 1, "--stall-at", 3, "--stall-s", 2)


@pytest.mark.skipif(
    find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed"
)
def test_the_tail_of_a_stalled_server_is_loadgens(generator, tmp_path):
    with support.serving(*STALL) as url:
        plan = support.plan_of(url, RATE, ((1, SECONDS),), slo_s=5.0)
        report = run_load(generator, plan, tmp_path / "ours")
    with support.serving(*STALL) as url:
        command = [sys.executable, str(CLIENT), url, str(RATE), str(SECONDS), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    theirs = json.loads(done.stdout)
    ours = {p.share: p.value for p in report.phases[0].response}
    # About 300 of 1,500 requests are due in the stall; their number varies by 6 %, the p95 by 2 %.
    assert ours[0.95] == pytest.approx(
        float(theirs["95.00 percentile latency (ns)"]) / 1e9, rel=0.1
    )
    assert ours[0.95] > 1.2
