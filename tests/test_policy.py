"""The policy: shipped catalogue, digest, overlays and errors."""

import pytest

from forge_harness.errors import ConfigError
from forge_harness.policy import load_policy
from forge_harness.types import Profile

SPECIFIED = {
    "environment": 12,
    "dependencies": 8,
    "configuration": 15,
    "data": 6,
    "architecture": 18,
    "training": 22,
    "performance": 14,
    "gates": 16,
    "integration": 10,
    "transitions": 4,
}


def test_the_first_ten_suites_do_not_fall_below_the_specification():
    counts = {suite: 0 for suite in SPECIFIED}
    for entry in load_policy().catalogue:
        counts[entry.suite] = counts.get(entry.suite, 0) + 1
    assert all(counts[suite] >= least for suite, least in SPECIFIED.items()), counts


def test_suite_weights_sum_to_one_hundred():
    assert sum(load_policy().suite_weights.values()) == 100


def test_every_check_needs_a_known_capability():
    from forge_harness.protocols import CAPABILITIES

    for entry in load_policy().catalogue:
        assert set(entry.requires) <= set(CAPABILITIES), entry.id
        if entry.not_applicable and entry.not_applicable.startswith("capability:"):
            assert entry.not_applicable.removeprefix("capability:") in CAPABILITIES


def test_the_quick_scope_is_most_of_the_catalogue():
    policy = load_policy()
    assert 130 <= len(policy.in_scope(Profile.QUICK)) < len(policy.in_scope(Profile.FULL))


def overlay(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_one_threshold_is_a_whole_policy_file_and_moves_the_digest(tmp_path):
    shipped = load_policy()
    path = overlay(tmp_path, "[thresholds.gates]\naccuracy.at_least = 0.9\n")
    changed = load_policy(path)
    assert changed.threshold("gates.accuracy.at_least") == 0.9
    assert changed.threshold("gates.latency.at_most") == shipped.threshold("gates.latency.at_most")
    assert changed.digest != shipped.digest


def test_formatting_does_not_move_the_digest(tmp_path):
    path = overlay(
        tmp_path, "# a comment\n[thresholds]\ngates = { accuracy = { at_least = 0.85 } }\n"
    )
    assert load_policy(path).digest == load_policy().digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[suite_weights]\ntraining = 0\n", "positive"),
        ("[severity_weight]\nhigh = 1\n", "severity_weight"),
        ("rule = 'mine'\n", "rule"),
        ("[thresholds.gates]\naccuracy.at_least = 'high'\n", "number"),
        ("not toml", "not valid TOML"),
    ],
)
def test_a_bad_policy_is_refused_by_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(overlay(tmp_path, text))


def test_an_unknown_threshold_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'gates\.accuracy\.at_least'"):
        load_policy().threshold("gates.accuracy.at_leas")


def test_a_policy_reads_back_from_json():
    from forge_harness.policy import Policy

    policy = load_policy()
    assert Policy.model_validate(policy.to_json()).digest == policy.digest


def test_a_changed_copy_has_a_digest_of_its_own():
    policy = load_policy()
    before = policy.digest
    changed = policy.model_copy(update={"thresholds": {}})
    assert changed.digest != before == policy.digest
