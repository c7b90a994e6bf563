"""A policy that judges more mildly is named wherever its digest is."""

from forge_harness.policy import Policy, load_policy
from forge_harness.scoring import policy_changes, policy_line


def changed(**values):
    return Policy.model_validate({**load_policy().to_json(), **values})


def test_the_policy_that_ships_is_its_digest_alone():
    assert policy_changes(load_policy()) == []
    assert policy_line(load_policy()) == f"Policy: {load_policy().digest}"


def test_a_lowered_threshold_is_named_with_both_values():
    thresholds = {**load_policy().thresholds, "gates.accuracy.at_least": 0.5}
    policy = changed(thresholds=thresholds)
    assert policy_changes(policy) == ["threshold gates.accuracy.at_least is 0.5, shipped 0.85"]
    assert policy_line(policy).startswith(f"Policy: {policy.digest}, not the one that ships: ")


def test_weights_and_checks_are_compared_too():
    base = load_policy().to_json()
    first, second, *rest = base["catalogue"]
    mild = {**second, "severity": "low"}
    own = {**second, "id": f"{second['suite']}.of_mine"}
    policy = changed(
        suite_weights={**base["suite_weights"], "gates": 1}, catalogue=[mild, *rest, own]
    )
    assert policy_changes(policy) == [
        "weight of suite gates is 1, shipped 10",
        f"1 shipped check left out ({first['id']} first)",
        f"severity of {second['id']} is 'low', shipped '{second['severity']}'",
        "1 check of your own",
    ]


def test_suites_of_your_own_are_named_with_the_share_they_take():
    base = load_policy().to_json()
    weights = {**base["suite_weights"], "mine": 1_000_000}
    assert policy_changes(changed(suite_weights=weights)) == [
        "weight of suite mine is 1000000, not in the shipped policy"
    ]


def test_what_is_added_is_counted():
    base = load_policy().to_json()
    policy = changed(
        thresholds={**base["thresholds"], "mine.a.at_least": 1.0, "mine.b.at_least": 1.0},
        units={**base["units"], "mine.a": "s"},
    )
    assert policy_changes(policy) == ["2 thresholds of your own", "1 unit of your own"]


def test_what_is_left_out_is_named():
    base = load_policy().to_json()
    units = {name: unit for name, unit in base["units"].items() if name != "gates.latency"}
    assert policy_changes(changed(units=units)) == [
        "unit of gates.latency is left out, shipped 's'"
    ]


def test_another_order_is_named_as_the_digest_is_another():
    policy = changed(catalogue=[*reversed(load_policy().to_json()["catalogue"])])
    assert policy_changes(policy) == ["the checks come in another order"]


def test_severities_weigh_otherwise():
    weights = {**load_policy().to_json()["severity_weights"], "critical": 1, "low": 9}
    assert policy_changes(changed(severity_weights=weights)) == [
        "weight of severity critical is 1, shipped 8",
        "weight of severity low is 9, shipped 1",
    ]


def test_all_that_is_left_out_or_changed_of_the_checks_is_named():
    first, second, third, *rest = load_policy().to_json()["catalogue"]
    mild = {**third, "severity": "low", "version": 9, "timeout_s": 1.5, "profiles": ["nightly"]}
    assert policy_changes(changed(catalogue=[mild, *rest])) == [
        f"2 shipped checks left out ({first['id']} first)",
        f"severity of {third['id']} is 'low', shipped '{third['severity']}'",
        f"version of {third['id']} is 9, shipped {third['version']}",
        f"profiles of {third['id']} is ['nightly'], shipped {third['profiles']}",
        f"timeout_s of {third['id']} is 1.5, shipped {third['timeout_s']:g}",
    ]
    assert second["id"] not in " ".join(policy_changes(changed(catalogue=[mild, *rest])))


def test_four_changes_are_listed_and_a_fifth_is_counted():
    weights = load_policy().suite_weights
    for count in (4, 5):
        light = {**weights, **dict.fromkeys(sorted(weights)[:count], 77)}
        policy = changed(suite_weights=light)
        assert len(policy_changes(policy)) == count
        line = policy_line(policy)
        assert line.count("weight of suite") == 4
        assert line.endswith("; and 1 more") is (count == 5)
        assert ("more" in line) is (count == 5)


def test_values_that_differ_read_differently():
    thresholds = {**load_policy().thresholds, "gates.accuracy.at_least": 0.84999999}
    assert policy_changes(changed(thresholds=thresholds)) == [
        "threshold gates.accuracy.at_least is 0.84999999, shipped 0.85"
    ]


def test_long_texts_are_cut():
    first, *rest = load_policy().to_json()["catalogue"]
    (change,) = policy_changes(changed(catalogue=[{**first, "title": "t" * 500}, *rest]))
    assert change.startswith(f"title of {first['id']} is 'tttt")
    assert f"{'t' * 78}\u2026, shipped '" in change
    assert "t" * 79 not in change
    (change,) = policy_changes(changed(catalogue=[{**first, "title": "t" * 78}, *rest]))
    assert f"is '{'t' * 78}', shipped" in change
    long = {**load_policy().to_json()["suite_weights"], "s" * 200: 1}
    (change,) = policy_changes(changed(suite_weights=long))
    assert change == f"weight of suite {'s' * 79}\u2026 is 1, not in the shipped policy"


def test_many_differences_are_counted():
    base = load_policy()
    doubled = {name: value * 2 + 1 for name, value in base.thresholds.items()}
    assert policy_line(changed(thresholds=doubled)).endswith(
        f"; and {len(base.thresholds) - 4} more"
    )
