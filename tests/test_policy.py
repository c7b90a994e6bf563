"""The policy: shipped catalogue, digest, overlays and errors."""

import re
from pathlib import Path

import pytest

from forge_harness.errors import ConfigError
from forge_harness.policy import load_policy
from forge_harness.types import Profile

ROOT = Path(__file__).parents[1]
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
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("[severity_weight]\nhigh = 1\n", "Did you mean 'severity_weights'"),
        ("catalogue = []\n", "Unknown key 'catalogue'"),
        ("thresholds = 3\n", "thresholds is 3; expected a table"),
        ("[[thresholds]]\n", "thresholds is a list; expected a table"),
        ("suite_weights = 3\n", "suite_weights is 3; expected a table"),
        ("[thresholds.gates]\naccuracy.at_least = nan\n", "finite number"),
        ("[thresholds.gates]\naccuracy.at_least = inf\n", "finite number"),
        ("[thresholds.gates]\naccuracy.at_least = 1e400\n", "finite number"),
        ("[thresholds.gates]\naccuracy.at_least = true\n", "valid number"),
        (
            "[thresholds.baseline]\nscore_drop.at_most = -1\n",
            r"toml: thresholds\.baseline\.score_drop\.at_most is -1; expected points from 0 to 100",
        ),
        (
            "[thresholds.baseline]\ngate_worsening.at_most = 2\n",
            r"gate_worsening\.at_most is 2; expected a share from 0 to 1, such as 0\.02 for 2 %",
        ),
        ("[thresholds.baseline]\ngate_worsening.at_most = 1e308\n", "is 1e.308; expected a share"),
        ("[suite_weights]\ndata = 1e23\n", "suite_weights.data: .*valid integer"),
        ("[suite_weights]\ndata = 100000000000000000000000\n", "suite_weights.data: .*less than"),
        ("[severity_weights]\nhigh = 1e23\n", "severity_weights.high: .*valid integer"),
        ("[severity_weights]\nhigh = -1\n", r"toml: severity_weights.high is -1; expected a pos"),
        ("[suite_weights]\ndata = 0\n", r"toml: suite_weights.data is 0; expected a positive int"),
        (f"[suite_weights]\ndata = {'9' * 5000}\n", "is not valid TOML"),
        (
            "[thresholds]\n'gates.accuracy.at_least' = 0.1\n[thresholds.gates]\n"
            "accuracy.at_least = 0.9\n",
            "thresholds.gates.accuracy.at_least is stated 2 times, in quotes and in a table; keep",
        ),
    ],
)
def test_a_bad_policy_is_refused_by_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(overlay(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_read_over_and_another_encoding_is_named(tmp_path):
    file = tmp_path / "policy.toml"
    text = "[suite_weights]\ndata = 3\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_policy(file).suite_weights["data"] == 3
    file.write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match="byte-order mark of UTF-16; save it in UTF-8"):
        load_policy(file)


@pytest.mark.parametrize(
    ("text", "got", "close"),
    [
        (
            "[thresholds.gates.acuracy]\nat_least = 0.99\n",
            "threshold 'gates.acuracy.at_least'",
            "gates.accuracy.at_least",
        ),
        (
            "[thresholds.gates]\naccuracy = 3\n",
            "threshold 'gates.accuracy'",
            "gates.accuracy.at_least",
        ),
        (
            "[thresholds.gates]\nlatency.at_least = 3\n",
            "threshold 'gates.latency.at_least'",
            "gates.latency.at_most",
        ),
        ("[units.gates]\nlatancy = 's'\n", "unit 'gates.latancy'", "gates.latency"),
    ],
)
def test_a_misspelt_threshold_or_unit_names_the_nearest(tmp_path, text, got, close):
    with pytest.raises(ConfigError) as caught:
        load_policy(overlay(tmp_path, text))
    assert f"Unknown {got}. Did you mean {close!r}?" in str(caught.value)
    assert "policy.toml" in str(caught.value)


def test_a_section_of_the_users_own_takes_any_threshold_and_its_unit(tmp_path):
    text = "[thresholds.mine]\nsize.at_most = 5\n[units.mine]\nsize = 'B'\n"
    policy = load_policy(overlay(tmp_path, text))
    assert (policy.threshold("mine.size.at_most"), policy.units["mine.size"]) == (5.0, "B")


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e300, 0])
def test_a_timeout_no_timer_takes_is_refused(timeout):
    from pydantic import ValidationError

    from forge_harness.policy import CatalogueEntry

    entry = load_policy().catalogue[0].model_dump()
    with pytest.raises(ValidationError, match="timeout_s"):
        CatalogueEntry.model_validate({**entry, "timeout_s": timeout})


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


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/ci.md"])
def test_what_pages_print_is_of_the_policy_that_ships(page):
    """A reader who pins the digest a page shows must not be refused."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^Policy: (sha256:\w+)", text, re.M)) == {load_policy().digest}
