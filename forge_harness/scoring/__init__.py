"""Outcomes -> score, coverage and verdict ("forge-score/1"), and their recomputation.

Nothing here imports torch or numpy; `forge_harness.scoring.statistics` does so when called.
"""

from forge_harness.scoring.assembly import (
    RunContext,
    Scope,
    assemble,
    context_of,
    entries_in_scope,
    items_of,
    judged_on,
    reassemble,
    score_of,
)
from forge_harness.scoring.policy_changes import (
    LISTED_CHANGES,
    listed_changes,
    policy_changes,
    policy_line,
)
from forge_harness.scoring.rescore import Rescored, rescore
from forge_harness.scoring.rollup import settle
from forge_harness.scoring.verdict import exit_code_for, gate_exit_code
from forge_harness.scoring.verify import Discrepancy, only_in_manifest, verify_run
from forge_harness.scoring.waterfall import Repair, WaterfallStep, waterfall, way_back

__all__ = [
    "LISTED_CHANGES",
    "Discrepancy",
    "Repair",
    "Rescored",
    "RunContext",
    "Scope",
    "WaterfallStep",
    "assemble",
    "context_of",
    "entries_in_scope",
    "exit_code_for",
    "gate_exit_code",
    "items_of",
    "judged_on",
    "listed_changes",
    "only_in_manifest",
    "policy_changes",
    "policy_line",
    "reassemble",
    "rescore",
    "score_of",
    "settle",
    "verify_run",
    "waterfall",
    "way_back",
]
