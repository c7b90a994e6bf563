"""Catalogues of the user's suites, inline checks, selections."""

from __future__ import annotations

import pytest

from forge_harness.errors import ConfigError, UsageError
from forge_harness.paths import suites_dir
from forge_harness.policy import load_policy
from forge_harness.selection import (
    InlineCheck,
    build_policy,
    catalogues_beside,
    inline_from,
    select,
    shipped_files,
)
from forge_harness.types import Profile, Severity

ENTRY = """
[[check]]
id = "mine.a"
title = "A"
suite = "mine"
severity = "high"
component = "user"
profiles = ["full"]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "catalogue.toml").write_text(ENTRY, encoding="utf-8")
    return tmp_path


def test_catalogues_beside_suites_are_found_but_never_ours(own):
    (own / "test_it.py").touch()
    paths = [own, own / "test_it.py", suites_dir(), own / "nowhere"]
    assert catalogues_beside(paths) == ((own / "catalogue.toml").resolve(),)


def test_a_users_catalogue_joins_the_policy(own):
    policy = build_policy(None, [own / "catalogue.toml"])
    assert policy.by_id["mine.a"].severity is Severity.HIGH
    assert policy.suite_weights["mine"] == 5
    assert len(policy.catalogue) == len(load_policy().catalogue) + 1
    assert policy.digest != load_policy().digest


def test_a_catalogue_states_the_weight_of_its_suites_only(own):
    weights = "[suite_weights]\nmine = 7\narchitecture = 1\n"
    (own / "catalogue.toml").write_text(weights + ENTRY, encoding="utf-8")
    policy = build_policy(None, [own / "catalogue.toml"])
    assert policy.suite_weights["mine"] == 7
    assert policy.suite_weights["architecture"] == load_policy().suite_weights["architecture"]


def test_inline_checks_join_once_and_in_any_order():
    checks = [InlineCheck("b.x", "X", "low"), InlineCheck("a.y", "Y", "critical")]
    policy = build_policy(inline=checks)
    assert policy.digest == build_policy(inline=[*reversed(checks), checks[0]]).digest
    assert (policy.by_id["a.y"].suite, policy.suite_weights["a"]) == ("a", 5)


def test_the_policy_of_a_run_is_whole(own, tmp_path):
    first = build_policy(None, [own / "catalogue.toml"], [InlineCheck("b.x", "X", "low")])
    file = tmp_path / "policy.json"
    file.write_text(first.model_dump_json(), encoding="utf-8")
    assert build_policy(file, [own / "catalogue.toml"]).digest == first.digest
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"policy\.json is not a policy"):
        build_policy(file)
    with pytest.raises(ConfigError, match=r"Cannot read .*gone\.json: No such file"):
        build_policy(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[check]]\nid = 'mine.a'", "Catalogue: catalogue.*Field required"),
        ("[[check", "is not valid TOML"),
        (ENTRY + ENTRY, "'mine.a' is in the catalogue twice"),
    ],
)
def test_a_bad_catalogue_is_one_sentence(own, text, message):
    (own / "catalogue.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        build_policy(None, [own / "catalogue.toml"])
    assert "\n" not in str(caught.value).rstrip()


def test_select_follows_profile_suites_and_checks(own):
    policy = build_policy(None, [own / "catalogue.toml"])
    assert "mine.a" not in {e.id for e in select(policy, Profile.QUICK)}
    assert "mine.a" in {e.id for e in select(policy, Profile.FULL)}
    both = select(policy, Profile.FULL, ["mine"], ["data.leak_canary"])
    assert [entry.id for entry in both] == ["data.leak_canary", "mine.a"]


@pytest.mark.parametrize(
    ("suites", "checks", "message"),
    [
        (["archtecture"], [], "Unknown suite 'archtecture'. Did you mean 'architecture'"),
        ([], ["data.leak_canry"], "Unknown check 'data.leak_canry'. Did you mean 'data.leak_"),
        ([], ["mine.a"], "'mine.a' is not in the quick profile; choose the profile full"),
    ],
)
def test_wrong_names_are_refused(own, suites, checks, message):
    policy = build_policy(None, [own / "catalogue.toml"])
    with pytest.raises(UsageError, match=message):
        select(policy, Profile.QUICK, suites, checks)


def test_inline_from_leaves_out_catalogued_and_unusable_marks():
    good = {"check": "a.b", "title": "T", "severity": "low", "component": "user", "problem": None}
    rows = [good, {**good, "title": None}, {**good, "severity": None}, {**good, "problem": "p"}]
    assert inline_from(rows) == [InlineCheck("a.b", "T", "low")]


def test_shipped_files_name_the_check_or_all_suites():
    (file,) = shipped_files(["architecture.weight_scale"])
    assert '"architecture.weight_scale"' in file.read_text(encoding="utf-8")
    assert shipped_files(["mine.a"]) == []
    assert shipped_files(["state.power_loss"]) in (
        [suites_dir()],
        shipped_files(["state.io_errors"]),
    )
