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
    inline_of,
    refuse_suites_without_checks,
    refuse_unread_names,
    select,
    shipped_files,
    with_inline,
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


def test_a_catalogue_states_the_weight_of_its_suite(own):
    (own / "catalogue.toml").write_text("[suite_weights]\nmine = 7\n" + ENTRY, encoding="utf-8")
    assert build_policy(None, [own / "catalogue.toml"]).suite_weights["mine"] == 7


def test_a_catalogue_that_contradicts_the_policy_is_refused(own, tmp_path):
    """Its weight of a shipped suite, and its severity of a shipped check, were passed over."""
    file = own / "catalogue.toml"
    file.write_text("[suite_weights]\narchitecture = 1\n" + ENTRY, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"'architecture' is a shipped one and weighs 14 .* not 1"
    ):
        build_policy(None, [file])
    heavier = tmp_path / "policy.toml"
    heavier.write_text("[suite_weights]\narchitecture = 1\n", encoding="utf-8")
    assert build_policy(heavier, [file]).suite_weights["architecture"] == 1
    file.write_text(ENTRY.replace("mine.a", "data.balance"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'data\.balance' is in the policy with other values"):
        build_policy(None, [file])


def test_a_whole_policy_without_a_shipped_suite_takes_a_catalogues_weight_of_it(own, tmp_path):
    """The policy.json of a release before the suite: it was an internal error, KeyError."""
    shipped = load_policy()
    weights = {name: w for name, w in shipped.suite_weights.items() if name != "security"}
    checks = tuple(
        entry
        for entry in shipped.catalogue
        if "security" not in (entry.suite, entry.measures_suite)
    )
    older = shipped.model_copy(update={"suite_weights": weights, "catalogue": checks})
    whole = tmp_path / "policy.json"
    whole.write_text(older.model_dump_json(), encoding="utf-8")
    entry = ENTRY.replace('"mine', '"security')
    (own / "catalogue.toml").write_text("[suite_weights]\nsecurity = 8\n" + entry)
    policy = build_policy(whole, [own / "catalogue.toml"])
    assert (policy.suite_weights["security"], "security.a" in policy.by_id) == (8, True)
    assert build_policy(whole).digest == older.digest


def test_two_catalogues_that_weigh_a_suite_differently_are_refused(tmp_path):
    """The one whose path came last won, and nothing said so."""
    files = []
    for name, weight in (("one", 5), ("same", 5), ("two", 50)):
        files.append(tmp_path / name / "catalogue.toml")
        files[-1].parent.mkdir()
        entry = ENTRY.replace("mine.a", f"mine.{name}")
        files[-1].write_text(f"[suite_weights]\nmine = {weight}\n{entry}", encoding="utf-8")
    assert build_policy(None, files[:2]).suite_weights["mine"] == 5
    for order in (files, files[::-1]):
        with pytest.raises(ConfigError) as caught:
            build_policy(None, order)
        said = str(caught.value)
        assert "suite 'mine' weighs" in said
        assert "state one weight" in said
        assert str(files[2]) in said


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
    text = first.model_dump_json()
    file.write_text('{"units":{},' + text[1:], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not a policy: key 'units' is there twice\."):
        build_policy(file)
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not a policy: it is empty\."):
        build_policy(file)
    loose = first.thresholds | {"baseline.gate_worsening.at_most": -0.5}
    file.write_text(first.model_copy(update={"thresholds": loose}).model_dump_json())
    with pytest.raises(ConfigError, match=r"policy\.json: thresholds\.baseline\..* is -0\.5; expe"):
        build_policy(file)
    with pytest.raises(ConfigError, match=r"Cannot read .*gone\.json: No such file"):
        build_policy(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[check]]\nid = 'mine.a'", r"catalogue\.toml: check 1: title: Field required"),
        ("[[check", "is not valid TOML"),
        (ENTRY + ENTRY, "'mine.a' is in the catalogue twice"),
        ("[[checks]]\nid = 'mine.a'\n", r"catalogue\.toml: Unknown key 'checks'.*'check'"),
        (ENTRY + "severty = 'low'\n", "check 1: Unknown key 'severty'. Did you mean 'severity'"),
        (ENTRY.replace("title", "titel"), "check 1: Unknown key 'titel'. Did you mean 'title'"),
        ("check = 5\n", "check is 5; expected a list of tables"),
        ("check = ['a']\n", "check 1 is 'a'; expected a table"),
        ("[check]\nid = 'mine.a'\n", "check is a table; expected a list of tables"),
        (ENTRY.replace('"mine.a"', "[]"), "check 1: id: "),
        ("suite_weights = 3\n" + ENTRY, "suite_weights is 3; expected a table"),
        ("[suite_weights]\nmine = 1e23\n" + ENTRY, "suite_weights.mine"),
        (ENTRY + "timeout_s = inf\n", "check 1: timeout_s: .*finite"),
        (ENTRY + "timeout_s = 1e300\n", "check 1: timeout_s: "),
        (ENTRY + "version = 99999999999999999999\n", "check 1: version: "),
        (ENTRY + "version = true\n", "check 1: version: .*integer"),
        (
            ENTRY + "not_applicable = 'capability:Trian'\n",
            "check 1: not_applicable: Unknown capability 'Trian'. Did you mean 'Trains'",
        ),
        (ENTRY + "requires = ['Trains', 'Packz']\n", "check 1: requires: Unknown .* mean 'Packs'"),
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


def test_a_broken_entry_is_refused_even_where_the_policy_has_its_check(own):
    text = ENTRY.replace("mine.a", "data.balance") + "severty = 'low'\n"
    (own / "catalogue.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="Unknown key 'severty'"):
        build_policy(None, [own / "catalogue.toml"])


def test_a_catalogue_may_weigh_a_suite_whose_checks_are_inline(own):
    (own / "catalogue.toml").write_text("[suite_weights]\nb = 7\n", encoding="utf-8")
    policy = build_policy(None, [own / "catalogue.toml"], [InlineCheck("b.x", "X", "low")])
    assert policy.suite_weights["b"] == 7
    refuse_unread_names(policy)
    with pytest.raises(ConfigError, match="Unknown suite 'b'"):
        refuse_unread_names(build_policy(None, [own / "catalogue.toml"]))


POLICY = """
[suite_weights]
mine = 3
b = 2
[thresholds.mine]
size.at_most = 5
[thresholds.b]
x.at_least = 1
"""


def test_a_policy_may_name_what_catalogues_and_inline_checks_add(own, tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(POLICY, encoding="utf-8")
    inline = [InlineCheck("b.x", "X", "low")]
    policy = build_policy(file, [own / "catalogue.toml"], inline)
    refuse_unread_names(policy)
    assert (policy.suite_weights["mine"], policy.suite_weights["b"]) == (3, 2)
    refuse_unread_names(build_policy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[suite_weights]\ndatta = 5\n", "Unknown suite 'datta'. Did you mean 'data'?"),
        ("[suite_weights]\nmien = 5\n", "Unknown suite 'mien'. Did you mean 'mine'?"),
        ("[thresholds.gatse]\naccuracy.at_least = 1\n", "Did you mean 'gates.accuracy.at_least'?"),
        ("[thresholds.data]\nsize.at_most = 1\n", "Unknown threshold 'data.size.at_most'."),
        ("[thresholds]\ngates = 1\n", "Unknown threshold 'gates'."),
    ],
)
def test_a_name_no_check_can_read_is_refused(own, tmp_path, text, message):
    file = tmp_path / "p.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        refuse_unread_names(build_policy(file, [own / "catalogue.toml"]))
    assert message in str(caught.value)


def test_a_suite_path_needs_a_check_or_a_catalogue(own, tmp_path):
    checks = tmp_path / "checks"
    checks.mkdir()
    file = checks / "test_it.py"
    file.touch()
    for nodeid in (f"{file}::test_a", "test_it.py::test_a"):
        refuse_suites_without_checks([checks, file], [nodeid])
    refuse_suites_without_checks([file], ["::test_a"])
    data = suites_dir() / "data"
    refuse_suites_without_checks([data], [f"data/{next(data.glob('test_*.py')).name}::test_a"])
    refuse_suites_without_checks([own], [])
    with pytest.raises(UsageError, match=f"Suite path {checks} holds no check; expected "):
        refuse_suites_without_checks([own, checks], ["elsewhere.py::test_a"])


def test_suite_paths_may_lie_within_each_other(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "test_it.py").touch()
    (tmp_path / "empty").mkdir()
    # pytest names a file relative to the first path that leads to it.
    refuse_suites_without_checks([tmp_path, inner], ["inner/test_it.py::test_a"])
    with pytest.raises(UsageError, match="empty holds no check"):
        refuse_suites_without_checks([tmp_path, tmp_path / "empty"], ["inner/test_it.py::test_a"])


def test_a_suite_path_that_is_no_python_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"Suite path .*notes\.txt is no Python file; expected"):
        refuse_suites_without_checks([tmp_path / "notes.txt"], [])


def test_checks_of_markers_are_told_from_those_of_files(own):
    marked = InlineCheck("mine.marked", "It is marked", "high")
    odd = InlineCheck("mine.odd", "It names a component", "low", "StateManager")
    beside = InlineCheck("training.mine", "It joins a shipped suite", "low")
    ran = build_policy(None, [own / "catalogue.toml"], [marked, odd, beside])
    # mine.a states its profiles, which no marker can.
    assert inline_of(ran, load_policy()) == [marked, odd, beside]
    assert inline_of(ran, ran) == []
    assert with_inline(build_policy(None, [own / "catalogue.toml"]), [marked, odd, beside]) == ran


def test_a_shipped_check_that_was_dropped_is_none_of_a_marker():
    shipped = load_policy()
    entry = next(e for e in shipped.catalogue if e.suite == "data")
    plain = type(entry)(
        **entry.model_dump(include={"id", "title", "suite", "severity", "component"})
    )
    before = shipped.model_copy(update={"catalogue": (plain,)})
    assert inline_of(before, shipped.model_copy(update={"catalogue": ()})) == []
