"""One load campaign on a server that is started for it: what the load checks read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge_harness.paths import resolved_path
from forge_harness.protocols import ServerSpec

from .driver import measure
from .plan import LoadPlan, Shape
from .target import started
from .traffic import read_requests

OBJECTIVE_S = 0.5
TIMEOUT_S = 2.0
QUICK: Shape = ((1, 10),)
"""The quick profile sees base load only; overload takes minutes."""


def load_campaign(spec: ServerSpec, directory: Path, *, profile: str, seed: int) -> dict[str, Any]:
    """Starts a server, finds its capacity, loads it and stops it.

    Args:
        spec: The server; its requests say what the right answers are.
        directory: New; records and report of the run.
        profile: `quick` measures base load, `full` and `nightly` overloads and recovery too.
        seed: Of the schedule.

    Returns:
        The report's document, with `exit_status` of the server and `first_answer_s`: seconds from
        the start of its process to the answer of the first request, None without one.

    Raises:
        LoadError: The server does not start, or serves nothing.
    """
    with started(spec.command) as target:
        first_answer_s = target.first_answer_s(read_requests(spec.requests)[0])
        template = LoadPlan(
            url=target.url,
            seed=seed,
            phases=(),
            requests=str(resolved_path(spec.requests)),
            timeout_s=TIMEOUT_S,
            slo_s=OBJECTIVE_S,
        )
        shape = QUICK if profile == "quick" else None
        report = measure(template, directory, profile=profile, shape=shape)
        status = target.stop()
    told = json.loads(report.to_json())
    return {**told, "exit_status": status, "first_answer_s": first_answer_s}
