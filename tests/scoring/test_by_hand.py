"""Score and verdict from run.json and policy.json alone, by what docs/cli.md says of them.

Shares no code with the package: a reader of the page with a JSON parser comes to the same result.
"""

from __future__ import annotations

import json
import random
from fractions import Fraction
from math import floor
from pathlib import Path

from forge_harness.scoring import Scope, assemble

ROOT = Path(__file__).parents[2]
HALF = Fraction(1, 2)
EARNS = {"pass": (1, 1), "warn": (HALF, HALF), "flaky": (HALF, HALF), "not_measured": (0, 1)}
BROKEN = ("fail", "error")
SEVERE = ("critical", "high")
OUTCOMES = ("warn", "flaky", "fail", "error", "not_measured")


def credit(check):
    if check["outcome"] in ("xfail", "xpass"):
        return 0, 0
    items = [EARNS.get(item["outcome"], (0, 0)) for item in check["items"]] or [(0, 1)]
    lows, highs = zip(*items, strict=True)
    if check["severity"] in SEVERE:
        return min(lows), min(highs)
    return Fraction(sum(lows), len(items)), Fraction(sum(highs), len(items))


def mean(pairs):
    pairs = list(pairs)
    total = sum(weight for weight, _ in pairs)
    return sum((weight * Fraction(value) for weight, value in pairs), Fraction(0)) / (total or 1)


def by_hand(run, policy):
    """Returns (low, high, share measured, verdict) of a finished run of a whole profile."""
    suites = {}
    for check in run["checks"]:
        if check["outcome"] != "not_applicable":
            suites.setdefault(check["suite"], []).append(check)
    applicable = [check for checks in suites.values() for check in checks]
    severity, weight = policy["severity_weights"], policy["suite_weights"]

    def scored(value):
        each = {
            name: mean((severity[check["severity"]], value(check)) for check in checks)
            for name, checks in suites.items()
        }
        return each, mean((weight[name], share) for name, share in each.items())

    lows, low = scored(lambda check: credit(check)[0])
    highs, high = scored(lambda check: credit(check)[1])
    _, measured = scored(
        lambda check: check["outcome"] != "not_measured" and bool(check["evidence"])
    )

    def any_is(level, *outcomes):
        return any(c["severity"] == level and c["outcome"] in outcomes for c in applicable)

    ceiling = 100
    if any_is("high", *BROKEN) or any_is("critical", "not_measured") or min(lows.values()) < HALF:
        ceiling = 79
    if any_is("critical", *BROKEN):
        ceiling = 49
    ends = [floor(min(100 * end, ceiling)) for end in (low, high)]
    blocked = any(any_is(level, *BROKEN) for level in SEVERE) or any(
        check["outcome"] == "xpass"
        or (
            check["severity"] == "critical"
            and check["outcome"] != "xfail"
            and any(item["outcome"] == "flaky" for item in check["items"])
        )
        for check in applicable
    )
    is_open = any(any_is(level, "not_measured") for level in SEVERE) or measured < Fraction(9, 10)
    hopeless = floor(100 * high) < 80 or min(highs.values()) < HALF
    if blocked or (is_open and hopeless):
        verdict = "FAIL"
    elif is_open:
        verdict = "INCOMPLETE"
    elif ends[0] < 80 or min(lows.values()) < HALF:
        verdict = "FAIL"
    elif ends[0] < 90 or any(check["outcome"] != "pass" for check in applicable):
        verdict = "PASS_WITH_WARNINGS"
    else:
        verdict = "PASS"
    return *ends, floor(measured * 10_000) / 10_000, verdict


def told(run):
    return run["score"]["low"], run["score"]["high"], run["coverage"], run["verdict"]


def test_of_the_example_run():
    run, policy = (
        json.loads((ROOT / "reports" / "example" / name).read_text(encoding="utf-8"))
        for name in ("run.json", "policy.json")
    )
    assert by_hand(run, policy) == told(run)


def test_of_runs_of_every_outcome(make):
    verdicts = set()
    for seed in range(300):
        draw = random.Random(seed)
        worst = draw.choice([0.0, 0.03, 0.15, 0.5])
        names = [f"{suite}.c{n}" for suite in "abc" for n in range(8)]
        levels = [draw.choice(["critical", "high", "medium", "low"]) for _ in names]
        policy = make.policy(*zip(names, levels, strict=True), weights={"a": 4, "b": 8, "c": 14})
        items = []
        for name in names:
            for n in range(draw.randint(1, 2)):
                outcome = draw.choice(OUTCOMES) if draw.random() < worst else "pass"
                evidence = draw.randint(0, 1) if outcome in BROKEN else 1
                items.append(make.item(name, outcome, number=n, evidence=evidence))
        waived = [make.waiver(names[0])] if draw.random() < worst else []
        record = assemble(policy, items, waivers=waived, scope=Scope(), context=make.context())
        run = record.model_dump(mode="json")
        assert by_hand(run, policy.to_json()) == told(run), seed
        verdicts.add(run["verdict"])
    assert verdicts == {"PASS", "PASS_WITH_WARNINGS", "INCOMPLETE", "FAIL"}
