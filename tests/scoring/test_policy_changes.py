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


def test_many_differences_are_counted():
    base = load_policy()
    doubled = {name: value * 2 + 1 for name, value in base.thresholds.items()}
    assert policy_line(changed(thresholds=doubled)).endswith(
        f"; and {len(base.thresholds) - 4} more"
    )
