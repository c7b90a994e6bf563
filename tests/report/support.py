"""Hand-built runs over the shipped catalogue, for the tests of the report."""

from __future__ import annotations

from forge_harness.integration.baselines import Acceptance
from forge_harness.integration.kept_runs import KeptFigure, kept_run, leading_to
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.load.timeline import record_timeline
from forge_harness.policy import Policy, load_policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord, Waiver
from forge_harness.scoring import RunContext, Scope, assemble
from forge_harness.types import Outcome, Profile

POLICY = load_policy()
FULL = Scope(profile=Profile.FULL)
CAPABILITIES = sorted(
    {name for entry in POLICY.catalogue for name in entry.requires}
    | {
        entry.not_applicable.partition(":")[2]
        for entry in POLICY.catalogue
        if (entry.not_applicable or "").startswith("capability:")
    }
)
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\u202e{{7*7}}]]>&amp;"
ARTIFACT = "evidence/sha256/" + "ab" * 32


def context(**changes):
    fields = {
        "run_id": "20260102T030405Z-0a1b2c3d",
        "subject": SubjectRecord(spec="toy.py:S", name="toy", capabilities=CAPABILITIES),
        "environment": {"os": "Linux", "packages": {"torch": "2.13.0"}, "cpu_quota": None},
        "declared": {"accelerator": "none"},
        "seed": 7,
        "command": ["forge-harness", "run", "--run-dir", "first run"],
        "started_at": "2026-01-02T03:04:05Z",
        "finished_at": "2026-01-02T03:16:05Z",
    }
    return RunContext(**{**fields, **changes})


def evidence(nodeid, name="value", value=1.0, **fields):
    defaults = {"unit": "1", "limit": None, "direction": "record", "reason": "", "samples": None}
    return EvidenceRecord(item=nodeid, name=name, value=value, **{**defaults, **fields})


def item(check, outcome="pass", *, reason="", log=None, rows=None, duration_s=0.25, **fields):
    nodeid = f"{check.replace('.', '/test_')}.py::test"
    if rows is None:
        rows = [
            evidence(
                nodeid,
                check.partition(".")[2],
                0.97 if outcome != "fail" else 0.5,
                limit=0.9,
                direction="at_least",
                reason="a stated reason",
                samples=[0.9 + 0.01 * (i % 7) for i in range(20)],
            ),
            evidence(nodeid, "count", 12_345, unit="runs", limit=12_345, direction="equal"),
        ]
    else:
        rows = [row.model_copy(update={"item": nodeid}) for row in rows]
    return ItemRecord(
        nodeid=nodeid,
        check=check,
        outcome=Outcome(outcome),
        reason=reason,
        duration_s=duration_s,
        evidence=rows,
        log=log,
        **fields,
    )


def quality_rows(with_curves=True):
    """Evidence as the quality gates record it."""
    rows = []
    for task, top in (("digits", 0.96), ("bytes", 0.45)):
        for arm, factor in (("ternary", 0.99), ("full", 1.0), ("post_training", 0.6)):
            name = f"{task}.{arm}"
            seeds = [top * factor + 0.004 * i for i in (-1, 0, 1)]
            rows += [
                evidence("", f"seeds.{name}", 3, samples=[0, 1, 2]),
                evidence("", f"steps.{name}", 600, unit="steps"),
                evidence("", f"learning_rate.{name}", 0.003),
                evidence("", f"accuracy.{name}", top * factor, samples=seeds),
                evidence("", f"loss.{name}", 1.5 - factor, unit="nats", samples=[0.5, 0.51, 0.49]),
            ]
            if with_curves and arm != "post_training":
                steps = [float(s) for s in range(0, 600, 10)]
                losses = [2.3 / (1 + s / 60) + (0.05 if arm == "ternary" else 0) for s in steps]
                rows.append(evidence("", f"loss_curve_steps.{name}", 60, samples=steps))
                rows.append(evidence("", f"loss_curve.{name}", losses[-1], samples=losses))
        for kind, value in (("ratio", 0.99), ("ratio_low", 0.985), ("ratio_high", 0.996)):
            rows.append(evidence("", f"{kind}.{task}", value))
    limit = {"limit": 0.987, "direction": "at_least"}
    rows.append(evidence("", "quantized_accuracy_ratio", 0.988, **limit))
    return rows


class Rows:
    """A recorder that keeps rows as a record has them."""

    def __init__(self):
        self.rows = []

    def record(self, name, value, *, unit="1", reason="", samples=None):
        self.rows.append(evidence("", name, value, unit=unit, samples=samples))


def load_document():
    """A load report's document, of three phases in windows of half a second."""
    phases, windows = [], []
    for start, (name, rate) in enumerate((("1x", 8), ("23x", 184), ("1x", 8))):
        ok = min(rate, 80)
        percentiles = [("p50", 0.02 * rate**0.5), ("p95", 0.05 * rate**0.5), ("p99", None)]
        phases.append(
            {
                "name": name,
                "start": 2.0 * start,
                "seconds": 2.0,
                "offered": 2 * rate,
                "goodput": float(ok),
                "counts": {"ok": 2 * ok, "shed": 2 * (rate - ok)},
                "problems": [],
                "response": [
                    {"name": n, "state": "measured" if v else "too_few", "value_s": v}
                    for n, v in percentiles
                ],
            }
        )
        for half in range(4):
            silent = name == "23x" and half == 1
            windows.append(
                {
                    "start": 2.0 * start + half / 2,
                    "offered": rate // 2,
                    "ok": 0 if silent else ok // 2,
                    "shed": (rate - ok) // 2,
                    "failed": ok // 2 if silent else 0,
                    "p50_s": None if silent else 0.02,
                    "p95_s": None if silent else 0.05,
                }
            )
    return {"plan": {"slo_s": 0.5}, "phases": phases, "windows": windows}


def load_rows(document=None):
    """Evidence as the load checks record it."""
    rows = Rows()
    record_timeline(rows, document or load_document())
    return rows.rows


def void_document():
    """A load of which the generator did not keep up in one phase."""
    document = load_document()
    document["phases"][1]["problems"] = ["the generator used 99 % of a core", "3 not sent"]
    return document


def items_of_all(outcomes=None, profile=Profile.FULL, load=None):
    """One item a check of the profile; `outcomes` maps check ids to outcome or None (no item)."""
    outcomes = outcomes or {}
    items = []
    for entry in POLICY.in_scope(profile):
        outcome = outcomes.get(entry.id, "pass")
        if outcome is None or entry.id == "environment.accelerator":
            continue
        rows = None
        if entry.id == "gates.quantized_accuracy_ratio":
            rows = quality_rows()
        elif entry.id == "performance.latency_percentiles":
            rows = [*load_rows(load), evidence("", "p95_limit", 0.03, unit="s", limit=0.5)]
        reason = "" if outcome == "pass" else f"{entry.id} ended {outcome}"
        log = None if outcome in ("pass", "not_measured") else "E   assert 1 == 2\n" * 3
        kept = [] if outcome == "not_measured" else rows
        items.append(item(entry.id, outcome, reason=reason, log=log, rows=kept))
    return items


def record(items=None, *, state="finished", scope=FULL, waivers=(), policy=POLICY, **changes):
    return assemble(
        policy,
        items_of_all() if items is None else items,
        waivers=waivers,
        scope=scope,
        context=context(**changes),
        state=state,
        state_reason="" if state == "finished" else "stopped by Ctrl-C",
    )


FAILING = {
    "architecture.weight_scale": "fail",
    "security.tls_1_3_only": "error",
    "data.balance": "warn",
    "training.overfit_one_batch": "flaky",
    "performance.load_10x": "not_measured",
    "gates.latency": None,
    "state.io_errors": "fail",
}
WAIVERS = (
    Waiver(
        check="state.io_errors",
        owner="storage team",
        reason="needs the new kernel",
        issue="https://example.org/17",
        expires="2026-03-01",
    ),
    Waiver(check="data.balance", owner="a", reason="b", issue="c", expires="2025-01-01"),
)


def failing_record():
    return record(items_of_all(FAILING, load=void_document()), waivers=WAIVERS)


def incomplete_record():
    missing = {entry.id: None for entry in POLICY.catalogue if entry.suite == "performance"}
    return record(items_of_all(missing))


def interrupted_record():
    return record(items_of_all()[:60], state="interrupted", finished_at=None)


def hostile_record():
    rows = [evidence("", HOSTILE, HOSTILE, unit=HOSTILE, reason=HOSTILE)]
    items = items_of_all()
    items[0] = item(items[0].check, "fail", reason=HOSTILE, log=HOSTILE, rows=rows)
    items.append(item("unknown.check", "pass", rows=rows))
    subject = SubjectRecord(spec=HOSTILE, name=HOSTILE, capabilities=[HOSTILE])
    waiver = Waiver(
        check="data.balance", owner=HOSTILE, reason=HOSTILE, issue=HOSTILE, expires="2027-01-01"
    )
    return record(
        items, subject=subject, waivers=[waiver], environment={HOSTILE + "W" * 600: HOSTILE}
    )


def hiding_record():
    hidden = item("unknown", "not_measured", reason="skipped itself whole: no GPU", rows=[])
    return record([*items_of_all(), hidden])


MACHINE = {"os": "Linux", "machine": "x86_64", "cpu": "Xeon", "cpu_usable": 4}
STRICTER = type(POLICY).model_validate(
    {**POLICY.to_json(), "thresholds": {**POLICY.thresholds, "gates.latency.at_most": 0.09}}
)


def gate_items(outcomes=None, **values):
    """`items_of_all`, with these values of gates: `gate_items(latency=0.05)`."""
    items = []
    for one in items_of_all(outcomes):
        name = one.check.removeprefix("gates.")
        if name in values and one.outcome is not Outcome.NOT_MEASURED:
            unit = POLICY.units[one.check]
            rows = [evidence("", name, values[name], unit=unit)]
            one = item(one.check, one.outcome, rows=rows)
        items.append(one)
    return items


def kept_record(day, outcomes=None, *, values=None, cpu="Xeon", **changes):
    """A run of a day in January that says what machine it is of."""
    fields = {**kept_fields(day, cpu), **changes}
    return record(gate_items(outcomes, **(values or {})), **fields)


def kept_fields(day, cpu="Xeon"):
    return {
        "run_id": f"run-{day}",
        "environment": {**MACHINE, "cpu": cpu, "git_commit": "0123456789abcdef", "git_dirty": True},
        "started_at": f"2026-01-{day:02}T03:04:05Z",
        "finished_at": f"2026-01-{day:02}T03:16:05Z",
    }


def baseline_of(record, policy=POLICY, **acceptance):
    accepted = None
    if acceptance:
        known = {"accepted_on": "2026-01-20", "run_digest": "sha256:ab"}
        accepted = Acceptance(**{**known, **acceptance})
    return QualityCoordinator(policy).baseline_of(record, accepted)


def history_of(record, runs, **options):
    """The history of (record, policy) pairs up to a record."""
    kept = [kept_run(run, policy, f"sha256:{run.run_id}") for run, policy in runs]
    return leading_to(record, kept, **options)


BEFORE = {"accuracy": 0.9, "latency": 0.05, "resource_use": 4.0, "compression_ratio": 10.0}
AFTER = {"accuracy": 0.97, "latency": 0.07, "resource_use": 4.05, "compression_ratio": 9.0}
WAS = {
    "data.leak_canary": "fail",
    "data.loader_order": "not_measured",
    "performance.load_10x": "fail",
    "training.overfit_one_batch": "flaky",
}


def compared_record():
    return kept_record(28, FAILING | {"gates.latency": "pass"}, values=AFTER, waivers=WAIVERS)


def compared_with():
    """A baseline somebody accepted, and kept runs on two machines under two policies."""
    before = baseline_of(
        kept_record(20, WAS, values=BEFORE), owner="ada", reason="new recipe", expires="2026-02-01"
    )
    runs = [
        (kept_record(2, policy=STRICTER), STRICTER),
        (kept_record(3, cpu="EPYC"), POLICY),
        (kept_record(4, {"gates.latency": None}, values={"accuracy": 0.91}), POLICY),
        (kept_record(5, values=BEFORE), POLICY),
        (kept_record(29), POLICY),
    ]
    return before, history_of(compared_record(), runs, without_score=2)


def hostile_against():
    """Another run of another policy, with names no run would have."""
    before = kept_record(20, WAS, policy=STRICTER, run_id=HOSTILE, declared={"x": HOSTILE})
    before = baseline_of(before, STRICTER, owner=HOSTILE, reason=HOSTILE)
    check = before.checks["data.balance"]
    before = before.model_copy(
        update={
            "commit": HOSTILE,
            "checks": {**before.checks, HOSTILE: check},
            "unscored": (HOSTILE,),
        }
    )
    record = hostile_record()
    kept = kept_run(record, POLICY, HOSTILE)
    figures = {HOSTILE: KeptFigure(value=1.5, unit=HOSTILE)}
    changed = {"run_id": HOSTILE + "2", "commit": HOSTILE, "figures": figures, "state": HOSTILE}
    return before, leading_to(record, [kept.model_copy(update=changed)])


def changed_policy(*, titles=None, severities=None, **values):
    """The shipped policy with other tables, titles or severities."""
    catalogue = [
        {
            **entry,
            "title": (titles or {}).get(entry["id"], entry["title"]),
            "severity": (severities or {}).get(entry["id"], entry["severity"]),
        }
        for entry in POLICY.to_json()["catalogue"]
    ]
    return Policy.model_validate({**POLICY.to_json(), "catalogue": catalogue, **values})


MILD = changed_policy(
    thresholds={
        **{name: value for name, value in POLICY.thresholds.items() if "latency" not in name},
        "gates.accuracy.at_least": 0.5,
    },
    suite_weights={**POLICY.suite_weights, "gates": 1, "security": 1, "state": 1},
    severities={"data.splits_disjoint": "low"},
    units={name: unit for name, unit in POLICY.units.items() if name != "gates.latency"},
)
"""Seven changes of all kinds, each to something milder."""


def mild_record(policy=MILD):
    """A run that was scored with another policy than the shipped one."""
    return assemble(policy, items_of_all(), scope=FULL, context=context())


POLICIES = {"mild": MILD}
AGAINST = {"compared": compared_with, "hostile": hostile_against}
"""Kind of run -> what it is held against: its baseline and its history."""
RECORDS = {
    "pass": record,
    "fail": failing_record,
    "incomplete": incomplete_record,
    "hiding": hiding_record,
    "interrupted": interrupted_record,
    "hostile": hostile_record,
    "compared": compared_record,
    "mild": mild_record,
}
