"""Shards put together are the run they were cut from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import ExitCode, UsageError
from forge_harness.record import RunRecord, SubjectRecord, Waiver
from forge_harness.scoring import Scope, assemble, gate_exit_code, reassemble
from forge_harness.scoring.merge import MergeSource, merge_records, missing_shards
from forge_harness.scoring.verdict import blocking_reasons
from forge_harness.types import Outcome, Profile

CHECKS = (("a.x", "critical"), ("a.y", "medium"), ("b.x", "high"), ("c.x", "low"), ("c.y", "high"))
OUTCOMES = ("pass", "warn", "flaky", "fail", "error", "not_measured", "not_applicable")
OF_A_RUN = {"run_id", "command", "started_at", "finished_at", "shards"}
"""What two runs of the same measurements differ in."""
MACHINE = {"os": "Linux", "cpu": "Xeon", "python": "3.11.7", "packages": {"torch": "2.13.0"}}


@pytest.fixture
def shard_of(make):
    """Makes the run of some checks: `shard_of(["a.x"], "1/2")`."""
    policy = make.policy(*CHECKS)

    def build(
        checks,
        shard="",
        *,
        items=None,
        state="finished",
        policy=policy,
        profile=Profile.QUICK,
        waivers=(),
        **fields,
    ):
        items = [make.item(check) for check in checks] if items is None else items
        shared = {"run_id": f"r{shard}", "environment": MACHINE, **fields}
        context = replace(make.context(), **shared)
        record = assemble(
            policy,
            items,
            waivers=waivers,
            scope=Scope(profile=profile, checks=tuple(checks), shard=shard),
            context=context,
            state=state,
            state_reason="why",
        )
        return MergeSource(f"run {shard}", record, f"sha256:{shard}")

    return build


@given(
    outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=10, max_size=10),
    places=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    order=st.permutations([0, 1, 2]),
)
def test_shards_in_any_order_give_the_whole(maker, outcomes, places, order):
    policy = maker.policy(*CHECKS)
    names = [name for name, _ in CHECKS]
    items = [
        maker.item(name, outcome, number=number)
        for number, (name, outcome) in enumerate(zip(names * 2, outcomes, strict=True))
    ]
    whole = assemble(policy, items, scope=Scope(), context=maker.context())
    sources = []
    for shard in (1, 2, 3):
        own = [name for name, place in zip(names, places, strict=True) if place == shard]
        record = assemble(
            policy,
            [item for item in items if item.check in own],
            # A shard without a check would be a whole run.
            scope=Scope(checks=tuple(own) or ("none",), shard=f"{shard}/3"),
            context=replace(maker.context(), run_id=f"r{shard}"),
        )
        sources.append(MergeSource(f"s{shard}", record, f"sha256:{shard}"))
    merged = merge_records(policy, [sources[place] for place in order])
    assert merged.model_dump(exclude=OF_A_RUN) == whole.model_dump(exclude=OF_A_RUN)
    assert [shard.scope.shard for shard in merged.shards] == ["1/3", "2/3", "3/3"]
    assert merged == merge_records(policy, sources)


@pytest.mark.parametrize(
    ("first", "again", "expected"),
    [("fail", "pass", "fail"), ("pass", "fail", "fail"), ("error", "pass", "error")],
)
def test_a_part_that_ran_again_hides_nothing(make, shard_of, first, again, expected):
    sources = [
        shard_of(["a.x"], "1/2", items=[make.item("a.x", first)], run_id="r1"),
        shard_of(["a.x"], "1/2", items=[make.item("a.x", again)], run_id="r2"),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert merged.checks[0].outcome is Outcome(expected)


RESULTS = st.sampled_from([outcome for outcome in OUTCOMES if outcome != "not_applicable"])


@given(
    severity=st.sampled_from(["critical", "high", "medium", "low"]),
    outcomes=st.lists(RESULTS, min_size=3, max_size=3),
    again=st.lists(st.tuples(st.integers(0, 2), RESULTS), min_size=1, max_size=3),
)
def test_merging_in_another_result_of_an_item_makes_nothing_better(
    maker, severity, outcomes, again
):
    policy = maker.policy(("a.x", severity), ("b.x", "medium"), ("c.x", "medium"))
    others = [maker.item("b.x"), maker.item("c.x")]
    first = [maker.item("a.x", outcome, number=n) for n, outcome in enumerate(outcomes)]
    second = [maker.item("a.x", outcome, number=n) for n, outcome in again]
    sources = []
    for n, items in enumerate(([*first, *others], second), 1):
        context = replace(maker.context(), run_id=f"r{n}")
        scope = Scope(checks=("a.x", "b.x", "c.x") if n == 1 else ("a.x",), shard="1/1")
        record = assemble(policy, items, scope=scope, context=context)
        sources.append(MergeSource(f"s{n}", record, f"sha256:{n}"))
    alone, merged = (merge_records(policy, sources[:count]) for count in (1, 2))
    assert merged.score.low <= alone.score.low
    assert merged.score.high <= alone.score.high
    assert len(blocking_reasons(merged.checks, [])) >= len(blocking_reasons(alone.checks, []))
    if blocking_reasons(alone.checks, []):
        assert gate_exit_code(merged) == ExitCode.GATE_FAILED
    elif gate_exit_code(merged) == ExitCode.PASS:
        # A result of what was not measured may close the gap that kept the run from its verdict.
        assert gate_exit_code(alone) == ExitCode.PASS or "not_measured" in outcomes
    assert reassemble(merged, policy) == merged
    assert merge_records(policy, sources[::-1]) == merged


def test_a_shard_that_was_skipped_does_not_hide_that_it_was_flaky(make, shard_of):
    """With both, the gate for failures ended with 0; with the flaky one alone, with 1."""
    flaky = make.item("a.x", "flaky", attempts=2)
    sources = [
        shard_of(["a.x"], "1/2", items=[flaky], run_id="r1"),
        shard_of(["a.x"], "1/2", items=[make.item("a.x", "not_measured")], run_id="r2"),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert merged.verdict == "FAIL"
    assert merged.verdict_reasons[0] == (
        "critical check a.x is flaky: why not_measured (also flaky: why flaky)"
    )


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        (("2026-06-15T12:00:00Z",) * 2, "xfail"),
        (("2026-06-14T23:00:00Z", "2026-06-16T00:00:00Z"), "fail"),
    ],
)
def test_a_waiver_that_ended_between_two_shards_excuses_nothing(make, shard_of, starts, expected):
    """It was live by the day of the first shard, and a red second one was run again beside it."""
    waiver = Waiver(check="b.x", owner="ada", reason="known", issue="#1", expires="2026-06-15")
    sources = [
        shard_of(["a.x"], "1/2", waivers=[waiver], started_at=starts[0], finished_at=starts[0]),
        shard_of(
            ["b.x"],
            "2/2",
            items=[make.item("b.x", "fail")],
            waivers=[waiver],
            started_at=starts[1],
            finished_at=starts[1],
        ),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    outcomes = {check.id: check.outcome for check in merged.checks}
    assert outcomes["b.x"] == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"git_commit": "1f", "git_dirty": False}, ""),
        ({"git_commit": "1f", "git_dirty": True}, "files were changed since its commit"),
        (
            {"git_commit": "1f", "git_dirty": None},
            "git did not say whether files were changed since its commit",
        ),
        ({"git_commit": None, "git_dirty": None}, "no commit says what it was"),
        ({}, "no commit says what it was"),
    ],
)
def test_what_source_shards_measured_is_said_where_it_is_not_known(
    make, shard_of, environment, said
):
    """Shards without git were of two sources, and the merge said nothing."""
    fields = {
        "environment": MACHINE | environment,
        "subject": SubjectRecord(spec="mine.py:s", name="s", capabilities=[]),
    }
    names = [name for name, _ in CHECKS]
    sources = [
        shard_of(names[:2], "1/2", **fields),
        shard_of(names[2:], "2/2", **fields),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert merged.verdict == ("PASS_WITH_WARNINGS" if said else "PASS")
    assert [said in reason for reason in merged.verdict_reasons] == ([True] if said else [])
    whole = assemble(
        make.policy(*CHECKS),
        [make.item(name) for name in names],
        context=replace(make.context(), **fields),
        scope=Scope(),
    )
    assert whole.verdict == "PASS"


def test_one_shard_alone_is_of_one_source(make, shard_of):
    """Nothing else was merged, and the run had a warning that its shards may differ."""
    names = [name for name, _ in CHECKS]
    for environment in ({}, {"git_commit": "1f", "git_dirty": True}):
        subject = SubjectRecord(spec="mine.py:s", name="s", capabilities=[])
        shard = shard_of(names, "1/1", environment=MACHINE | environment, subject=subject)
        merged = merge_records(make.policy(*CHECKS), [shard])
        assert (merged.verdict, merged.verdict_reasons) == ("PASS", [])


def test_what_no_shard_ran_is_not_measured(make, shard_of):
    merged = merge_records(make.policy(*CHECKS), [shard_of(["a.x", "a.y"], "1/2")])
    assert {c.id for c in merged.checks if c.outcome is Outcome.NOT_MEASURED} == {
        "b.x",
        "c.x",
        "c.y",
    }
    assert merged.verdict == "INCOMPLETE"
    assert missing_shards(merged) == ["2/2"]


def test_a_shard_that_was_cut_short_leaves_the_run_cut_short(make, shard_of):
    names = [name for name, _ in CHECKS]
    sources = [shard_of(names[:2], "1/2"), shard_of(names[2:], "2/2", state="interrupted")]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert (merged.state, merged.state_reason) == ("interrupted", "shard 2/2 is interrupted: why")
    assert merged.verdict == "INCOMPLETE"


def test_times_span_all_and_the_command_is_of_the_whole(make, shard_of):
    command = ["forge-harness", "run", "--shard", "1/2", "--policy", "p.toml", "--run-dir", "s1"]
    sources = [
        shard_of(["a.x"], "1/2", command=command, started_at="2026-06-15T11:00:00Z"),
        shard_of(["b.x"], "2/2", finished_at="2026-06-15T13:00:00Z"),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert merged.command == ["forge-harness", "run", "--policy", "p.toml"]
    spanned = ("2026-06-15T11:00:00Z", "2026-06-15T13:00:00Z")
    assert (merged.started_at, merged.finished_at) == spanned
    assert merged.shards[0].command == command
    assert merged.checks[0].command.endswith("--policy p.toml")


def test_times_of_two_zones_are_in_the_order_of_the_clock(make, shard_of):
    late, early = "2026-06-15T09:00:00-09:00", "2026-06-15T11:00:00Z"
    sources = [
        shard_of(["a.x"], "1/2", started_at=early, finished_at=early),
        shard_of(["b.x"], "2/2", started_at=late, finished_at=late),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert (merged.started_at, merged.finished_at) == (early, late)


def test_of_several_machines_the_record_keeps_what_they_share(make, shard_of):
    sources = [
        shard_of(["a.x"], "1/2"),
        shard_of(["b.x"], "2/2", environment={**MACHINE, "cpu": "EPYC"}),
    ]
    merged = merge_records(make.policy(*CHECKS), sources)
    assert merged.environment == {key: v for key, v in MACHINE.items() if key != "cpu"}
    assert [shard.environment["cpu"] for shard in merged.shards] == ["Xeon", "EPYC"]


TRAINS = {"spec": "reference", "name": "reference", "capabilities": ["Trains"]}
WAIVER = Waiver(check="c.x", owner="ann", reason="known", issue="#7", expires="2026-12-31")
STRANGERS = {
    "seed": ({"seed": 1}, "seed 0 and 1"),
    "subject": (
        {"subject": SubjectRecord(spec="other", name="other", capabilities=[])},
        "subject reference and other",
    ),
    "source": (
        {"subject": SubjectRecord(**TRAINS, digest="sha256:2")},
        "digest of the subject's file None and sha256:2",
    ),
    "capabilities": (
        {"subject": SubjectRecord(**{**TRAINS, "capabilities": []})},
        "capabilities of the subject ['Trains'] and []",
    ),
    "profile": ({"profile": Profile.FULL}, "profile quick and full"),
    "waivers": ({"waivers": (WAIVER,)}, "waivers [] and [{'check': 'c.x'"),
    "declared": ({"declared": {"accelerator": "none"}}, "declared {} and"),
    "commit": ({"environment": {**MACHINE, "git_commit": "abc"}}, "git_commit None and abc"),
    "python": ({"environment": {**MACHINE, "python": "3.12.0"}}, "python 3.11.7 and 3.12.0"),
    "package": (
        {"environment": {**MACHINE, "packages": {"torch": "2.12.0"}}},
        "packages torch 2.13.0 and 2.12.0",
    ),
    "same": ({"run_id": "r1/2"}, "are the same run r1/2; give each shard once"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_parts_of_another_run_are_refused(make, shard_of, name):
    fields, sentence = STRANGERS[name]
    sources = [shard_of(["a.x"], "1/2"), shard_of(["b.x"], "2/2", **fields)]
    with pytest.raises(UsageError) as error:
        merge_records(make.policy(*CHECKS), sources)
    assert sentence in str(error.value)
    assert "run 1/2 and run 2/2" in str(error.value)


def test_other_cuts_policies_and_merged_runs_are_refused(make, shard_of):
    policy = make.policy(*CHECKS)
    first = shard_of(["a.x"], "1/2")
    other = make.policy(*CHECKS, ("d.x", "low"))
    merged = merge_records(policy, [first])
    running = shard_of(["b.x"], "2/2", state="running")
    for sources, sentence in (
        ([], "No run to merge"),
        ([first, shard_of(["b.x"], "2/3")], "number of shards 2 and 3"),
        ([first, shard_of(["b.x"], "2/2", policy=other)], "policy sha256:"),
        ([shard_of(["b.x"], "2/2", policy=other)], "another policy"),
        ([first, MergeSource("m", merged, "sha256:m")], "m is merged already"),
        ([first, running], "run 2/2 did not finish"),
    ):
        with pytest.raises(UsageError, match=sentence):
            merge_records(policy, sources)


def test_a_record_of_an_earlier_release_reads_as_no_shard(make):
    record = assemble(make.policy(*CHECKS), [], scope=Scope(), context=make.context())
    values = record.model_dump(mode="json")
    del values["shards"], values["scope"]["shard"]
    assert RunRecord.model_validate(values) == record
