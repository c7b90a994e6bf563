"""The Report model: what it says of a run."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import forge_harness
from forge_harness.record import ScopeRecord, ShardRecord, Waiver
from forge_harness.report import build_report
from forge_harness.report.build import linked
from forge_harness.report.model import Span
from forge_harness.scoring import assemble, waterfall
from forge_harness.types import Outcome

from . import support


@pytest.fixture
def make_shard():
    """Makes what a merged run keeps of a shard that started then."""

    def make(started_at):
        scope = {"profile": "full", "suites": [], "checks": [], "in_scope": 1, "total": 1}
        return ShardRecord(
            file="shards/1/run.json",
            digest="sha256:1",
            run_id=f"r{started_at}",
            scope=ScopeRecord(**scope, shard="1/2"),
            state="finished",
            command=[],
            environment={},
            started_at=started_at,
            finished_at=started_at,
        )

    return make


def anchors(report):
    known = {"verdict", "changes", "suites", "components", "quality", "load", "checks", "unscored"}
    known |= {"trend", "uncollected", "waivers", "specification", "provenance"}
    known |= {check.anchor for check in report.checks}
    return known | {row.anchor for check in report.checks for row in check.evidence}


@pytest.mark.parametrize("kind", support.RECORDS)
def test_every_anchor_of_the_model_is_a_place_in_it(kind, report_of):
    report = report_of(kind)
    used = {span.anchor for reason in report.reasons for span in reason if span.anchor}
    used |= {row.anchor for row in (*report.suites, *report.components)}
    used |= {loss.anchor for loss in report.losses if loss.anchor}
    used |= {row.anchor for s in report.specification for row in s.rows if row.anchor}
    used |= {cell.anchor for t in report.quality for arm in t.arms for cell in arm.cells if cell}
    used |= {curve.anchor for task in report.quality for curve in task.curves}
    load = report.load
    used |= {cell.anchor for p in (load.phases if load else ()) for cell in p.cells if cell}
    used |= {figure.anchor for _, figure in (load.figures if load else ())}
    used |= {waiver.anchor for waiver in report.waivers if waiver.anchor}
    assert used <= anchors(report)


def test_the_six_components_come_first_in_the_order_of_the_specification(report_of):
    assert [row.name for row in report_of("pass").components] == [
        "Phase4Connector",
        "Phase6Preparer",
        "PipelineValidator",
        "StateManager",
        "MLOpsCoordinator",
        "QualityCoordinator",
    ]


def test_a_component_is_scored_by_the_rule_over_its_own_checks(report_of):
    rows = {row.name: row for row in report_of("fail").components}
    assert (rows["Phase4Connector"].low, rows["Phase4Connector"].high) == (49, 49)  # critical fails
    assert (rows["MLOpsCoordinator"].low, rows["MLOpsCoordinator"].high) == (79, 79)  # high errors
    assert (rows["Phase6Preparer"].low, rows["Phase6Preparer"].high) == (100, 100)
    assert rows["QualityCoordinator"].low < rows["QualityCoordinator"].high == 100
    assert rows["QualityCoordinator"].measured_percent < 100


def test_points_lost_are_those_of_the_waterfall(run_record, report_of):
    steps = {step.id: step for step in waterfall(run_record("fail"), support.POLICY)}
    check = report_of("fail").check("architecture.weight_scale")
    assert check.points_lost == f"{steps['architecture.weight_scale'].shown:.2f}" != "0.00"
    assert report_of("fail").check("data.splits_disjoint").points_lost == ""


def test_ids_in_a_reason_become_links_once():
    known = {"a.b", "a.c"}
    assert linked("check a.b failed: a.b is bad, see x.y and a.c", known) == (
        Span(text="check "),
        Span(text="a.b", anchor="check-a.b"),
        Span(text=" failed: a.b is bad, see x.y and "),
        Span(text="a.c", anchor="check-a.c"),
    )
    assert linked("the score is 70, under 80", known)[0].anchor == "suites"
    assert linked("the run is interrupted", known)[0].anchor == "provenance"
    assert linked("a waiver names check 'q.r', which", known)[0].anchor == "waivers"


@pytest.mark.parametrize("word", ["x", "0a", "a_", "a.", "a.b."])
def test_a_reason_of_any_length_is_linked_at_once(word):
    # Of a word without an end each letter was a start once: ten minutes for these 2 MB.
    text = "".join(span.text for span in linked(word * 1_000_000, {"a.b"}))
    assert len(text) == 2000
    assert text.endswith("\u2026")


def test_a_run_that_did_not_finish_says_so(report_of):
    (alert,) = report_of("interrupted").headline.alerts
    assert (
        alert == "The run is interrupted: stopped by Ctrl-C. What it did not reach is not measured."
    )
    assert report_of("pass").headline.alerts == ()


def test_another_policy_than_the_recorded_one_is_an_alert(run_record):
    other = support.POLICY.model_copy(
        update={"thresholds": {**support.POLICY.thresholds, "gates.latency.at_most": 9.0}}
    )
    # model_copy keeps cached values of the original, its digest included.
    other = type(other).model_validate(other.to_json())
    alert, changed = build_report(run_record("pass"), other).headline.alerts
    assert run_record("pass").policy_digest in alert
    assert other.digest in alert
    assert "gates.latency.at_most is 9" in changed


def test_a_policy_that_does_not_ship_is_an_alert_with_what_it_changes(report_of):
    head = report_of("mild").headline
    (alert,) = head.alerts
    assert alert == (
        "The policy is not the one that ships with this harness: "
        f"{'; '.join(head.policy_changes[:4])}; and 3 more. That one is {support.POLICY.digest}."
    )
    assert head.policy_digest == support.MILD.digest
    assert head.policy_changes[0] == "threshold gates.accuracy.at_least is 0.5, shipped 0.85"
    assert (
        head.policy_changes[-1] == "severity of data.splits_disjoint is 'low', shipped 'critical'"
    )


def test_the_shipped_policy_is_no_alert(report_of):
    assert report_of("fail").headline.policy_changes == ()


def test_what_the_policy_says_is_shown_as_it_is():
    """Titles come as Python writes them; names of suites need it said."""
    name = "sound\u202e \x1b[31mdnuos"
    weights = {**support.POLICY.suite_weights, name: 1}
    policy = support.changed_policy(titles={"data.balance": name}, suite_weights=weights)
    head = build_report(support.mild_record(policy), policy).headline
    assert head.policy_changes[-1] == (
        "weight of suite sound\\u202e dnuos is 1, not in the shipped policy"
    )
    assert all(text.isprintable() for text in (*head.policy_changes, *head.alerts))


def test_waivers_are_live_or_expired_on_the_day_of_the_run(report_of):
    live = {row.check: (row.live, row.outcome) for row in report_of("fail").waivers}
    assert live == {"state.io_errors": (True, "xfail"), "data.balance": (False, "fail")}


def test_a_waiver_that_ended_between_two_shards_is_shown_as_the_verdict_has_it(make_shard):
    """The page called it live, by the day of the first shard; the verdict said expired."""
    waiver = Waiver(check="data.balance", owner="ada", reason="r", issue="#1", expires="2026-01-02")
    for day, live, outcome in (("02", True, "xfail"), ("03", False, "fail")):
        shards = [make_shard("2026-01-02T23:59:00Z"), make_shard(f"2026-01-{day}T00:01:00Z")]
        record = assemble(
            support.POLICY,
            [support.item("data.balance", "fail")],
            waivers=[waiver],
            scope=support.FULL,
            context=support.context(
                started_at="2026-01-02T23:59:00Z", finished_at=None, shards=shards
            ),
        )
        (row,) = build_report(record, support.POLICY).waivers
        assert (row.live, row.outcome) == (live, outcome)


def test_one_function_says_by_which_day_a_run_is_judged():
    """A start without its time is the day of one shard, and other code must not decide by it."""
    package = Path(forge_harness.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    cut = re.compile(r"(started_at|starts?)\b[^\n]{0,30}(\[:10\]|partition\(.T.\)|split\(.T.\))")
    assert cut.search("day = record.started_at[:10]")
    found = [path.name for path, text in texts.items() if cut.search(text)]
    assert not found, "use scoring.judged_on"


def test_changes_against_a_baseline(run_record):
    report = build_report(run_record("fail"), support.POLICY, run_record("pass"))
    changes = report.changes
    assert changes.baseline == run_record("pass").run_id
    failing = {change.check for change in changes.newly_failing}
    assert failing == {"architecture.weight_scale", "security.tls_1_3_only", "data.balance"}
    missing = {change.check for change in changes.newly_not_measured}
    assert missing == {"performance.load_10x", "gates.latency"}
    back = build_report(run_record("pass"), support.POLICY, run_record("fail")).changes
    assert {change.check for change in back.fixed} == failing
    assert back.newly_failing == ()
    assert build_report(run_record("pass"), support.POLICY).changes.baseline is None


def test_quality_is_read_from_what_the_gates_recorded(report_of):
    digits, text = report_of("pass").quality
    assert (digits.task, text.task) == ("digits", "bytes")
    assert [arm.arm for arm in digits.arms] == [
        "full precision",
        "ternary (trained)",
        "post-training ternary",
    ]
    accuracy = dict(zip(digits.columns, digits.arms[1].cells, strict=True))["accuracy"]
    assert accuracy.text == "0.9504"
    assert accuracy.detail == "95 %: 0.9405 to 0.9603, n = 3"  # t(2) * 0.004 / sqrt(3)
    label, ratio = digits.comparisons[0]
    assert (label, ratio.text) == ("ternary over full-precision accuracy", "0.99")
    assert ratio.detail == "95 %: 0.985 to 0.996"
    assert [curve.arm for curve in digits.curves] == ["full precision", "ternary (trained)"]
    assert digits.curves[0].steps[:2] == (0.0, 10.0)


def test_curves_without_matching_steps_are_numbered():
    rows = [
        support.evidence("", "accuracy.t.full", 0.5, samples=[0.5]),
        support.evidence("", "loss_curve_steps.t.full", 2, samples=[1.0, 2.0]),
        support.evidence("", "loss_curve.t.full", 0.1, samples=[0.3, 0.2, 0.1]),
    ]
    items = [support.item("gates.accuracy", rows=rows)]
    (task,) = build_report(support.record(items), support.POLICY).quality
    assert task.curves[0].steps == (0.0, 1.0, 2.0)
    assert task.arms[0].cells[0].detail == "one seed, no interval"
    assert task.arms[0].cells[1] is None


def test_load_is_read_from_what_the_load_checks_recorded(report_of):
    load = report_of("pass").load
    assert [phase.name for phase in load.phases] == ["1x", "23x", "1x"]
    overload = dict(zip(load.columns, load.phases[1].cells, strict=True))
    assert [overload[name].text for name in ("offered/s", "right and in time/s", "right")] == [
        "184",
        "80",
        "160",
    ]
    assert (overload["shed"].text, overload["failed"].text) == ("208", "0")
    assert overload["p99"] is None  # too few samples is not a number
    assert ("p95 at base load", "0.03 s") in [(n, f.text) for n, f in load.figures]


def test_a_timeline_comes_back_as_it_was_recorded(report_of):
    timeline, document = report_of("pass").load.timeline, support.load_document()
    assert [asdict(window) for window in timeline.windows] == document["windows"]
    spans = [(phase["name"], phase["start"], phase["seconds"]) for phase in document["phases"]]
    assert [(span.name, span.start, span.seconds) for span in timeline.spans] == spans
    assert (timeline.slo_s, timeline.seconds) == (0.5, 6.0)


def test_a_phase_that_was_not_the_load_it_was_meant_to_be_is_void(report_of):
    load = report_of("fail").load
    assert [phase.void for phase in load.phases] == [
        "",
        "the generator used 99 % of a core; 3 not sent",
        "",
    ]
    assert [span.problem for span in load.timeline.spans] == [p.void for p in load.phases]


def test_values_of_checks_that_did_not_pass_are_doubted(report_of):
    assert report_of("pass").quality_doubts == report_of("pass").load.doubts == ()
    assert [(d.check, d.outcome) for d in report_of("fail").load.doubts] == [
        ("performance.load_10x", "not_measured")
    ]
    items = support.items_of_all()
    undecided = {"outcome": Outcome.NOT_MEASURED, "reason": "the limit lies between the bounds"}
    items = [
        i.model_copy(update=undecided) if i.check == "gates.quantized_accuracy_ratio" else i
        for i in items
    ]
    (doubt,) = build_report(support.record(items), support.POLICY).quality_doubts
    assert (doubt.check, doubt.reason) == (
        "gates.quantized_accuracy_ratio",
        "the limit lies between the bounds",
    )


def test_what_ended_the_search_for_the_capacity_is_with_it():
    rows = [support.evidence("", "peak_capacity", 80.0, reason="limited by generator")]
    items = [i for i in support.items_of_all() if i.check != "performance.peak_capacity"]
    items.append(support.item("performance.peak_capacity", rows=rows))
    figures = dict(build_report(support.record(items), support.POLICY).load.figures)
    found = figures["capacity: highest rate within the objective"]
    assert (found.text, found.detail) == ("80", "limited by generator")


def test_windows_of_different_counts_are_not_plotted():
    rows = support.load_rows()
    row = next(row for row in rows if row.name == "load.window.shed")
    short = row.model_copy(update={"samples": row.samples[1:]})
    kept = [short if other is row else other for other in rows]
    items = [support.item("performance.latency_percentiles", rows=kept)]
    load = build_report(support.record(items), support.POLICY).load
    assert (len(load.phases), load.timeline) == (3, None)


def test_without_a_load_there_is_none_in_the_report():
    items = [support.item("performance.latency_percentiles", "not_measured", rows=[])]
    assert build_report(support.record(items), support.POLICY).load is None


@pytest.mark.parametrize(
    ("direction", "value", "limit", "shown"),
    [
        ("at_least", 0.9899999999, 0.99, ("0.9899999999", "at least 0.99")),
        ("within", 2.0000000001, [1.0, 2.0], ("2.0000000001", "1.0 to 2.0")),
        ("equal", "\x1b[31mred", "red", ("'\\x1b[31mred'", "exactly 'red'")),
        ("at_least", 0.99, 0.99, ("0.99", "at least 0.99")),
        ("at_least", 0.5, 0.99, ("0.5", "at least 0.99")),
    ],
)
def test_a_value_that_missed_its_limit_does_not_read_as_the_limit(direction, value, limit, shown):
    rows = [support.evidence("", "x", value, limit=limit, direction=direction)]
    report = build_report(
        support.record([support.item("data.balance", "fail", rows=rows)]), support.POLICY
    )
    (row,) = report.check("data.balance").evidence
    assert (row.actual, row.expected) == shown


def test_limits_are_words_and_missed_ones_are_marked():
    rows = [
        support.evidence("", "over", 2.0, limit=1.0, direction="at_most", unit="s"),
        support.evidence("", "soft", 2.0, limit=1.0, direction="at_most", level="warn"),
        support.evidence("", "inside", 2, limit=[1.0, 3.0], direction="within", unit="GB"),
        support.evidence("", "same", True, limit=True, direction="equal"),
        support.evidence("", "broken", "nan"),
        support.evidence("", "noted", "text"),
    ]
    report = build_report(
        support.record([support.item("data.balance", "fail", rows=rows)]), support.POLICY
    )
    shown = [(r.actual, r.expected, r.state) for r in report.check("data.balance").evidence]
    assert shown == [
        ("2 s", "at most 1 s", "fail"),
        ("2", "at most 1", "warn"),
        ("2 GB", "1 to 3 GB", "pass"),
        ("yes", "exactly yes", "pass"),
        ("nan", "", "fail"),
        ("text", "", "info"),
    ]


@pytest.mark.parametrize(("count", "said"), [(1, "item belongs"), (2, "items belong")])
def test_items_of_no_check_are_counted_in_the_alert(count, said):
    strangers = [support.item(f"unknown.x{i}") for i in range(count)]
    record = support.record([*support.items_of_all(), *strangers])
    (alert,) = build_report(record, support.POLICY).headline.alerts
    assert alert.startswith(f"{count} collected {said} to no check in scope; ")


def test_a_module_that_skipped_itself_is_told_apart_and_linked(report_of):
    report = report_of("hiding")
    (hidden,) = report.uncollected
    assert (hidden.reason, report.unscored) == ("skipped itself whole: no GPU", ())
    assert report.reasons[0][0].anchor == "uncollected"
    (alert,) = report.headline.alerts
    assert alert.startswith("1 module of the suites skipped itself; the checks in there")
