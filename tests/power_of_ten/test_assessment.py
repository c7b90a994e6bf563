"""Scores over trees whose counts are known by hand."""

import os
import sys
from datetime import date
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import ConfigError, UsageError
from forge_harness.power_of_ten import Waiver, assess, assessment, c_source, load_waivers
from forge_harness.power_of_ten.documentation import documentation

RECURSIVE = "def f(n):\n    return f(n - 1)\n\n\ndef g():\n    return 1\n"
TODAY = date(2026, 1, 15)


def tree(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def waiver(**changes):
    defaults = {"rule": 1, "file": "a.py", "owner": "me", "expires": TODAY, "reason": "known"}
    return Waiver(**{**defaults, **changes})


def score(root, rule=1, **options):
    return assess([root], today=TODAY, **options).rules[rule - 1].score


def test_a_rule_is_one_minus_broken_over_opportunities(tmp_path):
    assert score(tree(tmp_path, a=RECURSIVE)) == Fraction(1, 2)


def test_a_waived_place_costs_half_until_its_last_day(tmp_path):
    root = tree(tmp_path, a=RECURSIVE)
    assert score(root, waivers=[waiver()]) == Fraction(3, 4)
    assert score(root, waivers=[waiver(expires=date(2026, 1, 14))]) == Fraction(1, 2)
    assert score(root, waivers=[waiver(file="b.py")]) == Fraction(1, 2)
    assert score(root, waivers=[waiver(rule=2)]) == Fraction(1, 2)


def test_a_rule_without_an_opportunity_is_not_applicable(tmp_path):
    found = assess([tree(tmp_path, a="x = 1\n")])
    assert found.rules[2].score is None
    performance = next(c for c in found.categories if c.name == "Performance")
    assert performance.score is None


def test_an_empty_tree_has_no_score(tmp_path):
    found = assess([tmp_path])
    assert (found.files, found.mean, found.lowest) == (0, None, None)


def test_a_file_that_cannot_be_parsed_scores_zero_for_every_rule(tmp_path):
    found = assess([tree(tmp_path, a="def f(:\n")])
    assert [rule.score for rule in found.rules] == [0] * 10
    assert "a.py:0: not counted" in found.unreadable[0].sentence()


def test_a_missing_tool_scores_zero(tmp_path, monkeypatch):
    root = tree(tmp_path, a="x = 1\n")
    assert score(root, 10) == 1
    monkeypatch.setattr(assessment, "find_tool", lambda name: None)
    found = assess([root]).rules[9]
    assert found.score == 0
    assert [m.missing for m in found.measures if m.tool == "ruff"] == ["not installed"]


def test_a_tool_that_fails_scores_zero(tmp_path):
    root = tree(tmp_path, a="x = 1\n")
    (tmp_path / "ruff.toml").write_text("no such option = 1\n")
    found = assess([root]).rules[9]
    assert found.score == 0
    assert [m.exit_code for m in found.measures if m.missing] == [2]


def test_a_warning_of_the_trees_own_configuration_counts_once_a_file(tmp_path):
    root = tree(tmp_path, a="import os\nimport sys\n", b="x = 1\n")
    found = assess([root]).rules[9]
    assert found.score == Fraction(1, 2)
    assert "imported but unused" in found.places[0].what


def test_trees_are_counted_as_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    roots = [tree(tmp_path / "one", a=RECURSIVE), tree(tmp_path / "two", b=RECURSIVE)]
    found = assess(roots)
    assert found.files == 2
    assert (found.rules[0].opportunities, found.rules[0].score) == (4, Fraction(1, 2))


def test_a_file_of_several_trees_is_counted_once(tmp_path):
    (tmp_path / "part").mkdir()
    part = tree(tmp_path / "part", a=RECURSIVE)
    whole = assess([tree(tmp_path, b="import os\n")])
    for roots in ([tmp_path, part], [tmp_path, part / "a.py"], [tmp_path, tmp_path]):
        found = assess(roots)
        assert (found.files, found.mean, found.digest()) == (2, whole.mean, whole.digest())
        assert documentation(roots) == documentation([tmp_path])


def test_no_such_tree_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        assess([tmp_path / "nowhere"])


def test_the_digest_is_of_the_places(tmp_path):
    root = tree(tmp_path, a=RECURSIVE)
    first = assess([root]).digest()
    assert assess([root]).digest() == first
    tree(tmp_path, a="\n" + RECURSIVE)
    assert assess([root]).digest() != first


@given(broken=st.lists(st.booleans(), min_size=1, max_size=12))
def test_scores_stay_between_zero_and_one(broken, tmp_path_factory):
    functions = [
        f"def f{i}(n):\n    return {f'f{i}(n)' if bad else 'n'}\n" for i, bad in enumerate(broken)
    ]
    root = tree(tmp_path_factory.mktemp("tree"), a="\n\n".join(functions))
    assert score(root) == 1 - Fraction(sum(broken), len(broken))


def test_waivers_are_read_from_a_file(tmp_path):
    file = tmp_path / "waivers.toml"
    text = '[[waiver]]\nrule = 4\nfile = "a.py"\nowner = "me"\nexpires = 2026-02-01\nreason = "x"\n'
    file.write_text(text)
    assert load_waivers(file) == [
        waiver(rule=4, expires=date(2026, 2, 1), reason="x"),
    ]
    for before, after in [
        ("rule = 4", "rule = 11"),
        ("2026-02-01", '"soon"'),
        ('owner = "me"', 'owner = ""'),
        ('reason = "x"\n', ""),
        ("[[waiver]]", "[[waiver"),
        ("[[waiver]]", "[[waivers]]"),
        ("rule = 4", "rule = [4]"),
        ("rule = 4", "rule = true"),
        ('"a.py"', "7"),
        ('"x"', '" "'),
    ]:
        file.write_text(text.replace(before, after))
        with pytest.raises(ConfigError):
            load_waivers(file)


@pytest.mark.parametrize("name", ["pipe.py", "[pipe].py", "pipe.pyi"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, name):
    root = tree(tmp_path, a=RECURSIVE)
    (root / "deeper").mkdir()
    os.mkfifo(root / "deeper" / name)
    before = assess([root], today=TODAY)
    assert before.files == 1
    (measure,) = [m for m in before.rules[9].measures if m.tool == "ruff"]
    assert measure.missing == ""
    assert measure.opportunities == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.py", b"\xef\xbb\xbfx = 1\n"),
        ("latin.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"),
        ("latin.c", b"// caf\xe9\nint f() { return 0; }\n"),
        ("bom.c", b"\xef\xbb\xbfint f() { return 0; }\n"),
    ],
)
def test_source_in_another_encoding_is_counted(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = assess([tmp_path])
    assert found.unreadable == ()
    # Rule 10 is ruff's, which reads UTF-8 only.
    assert all(rule.score in (None, 1) for rule in found.rules[:9])


@pytest.mark.parametrize(
    "content", [b"x = " + b"-" * 200_000 + b"1\n", b"# coding: nonesuch\n", b"x = '\xe9'\n", b"\0"]
)
def test_source_no_parser_takes_is_unreadable_and_no_error(tmp_path, content):
    (tmp_path / "a.py").write_bytes(content)
    (place,) = assess([tmp_path]).unreadable
    assert place.sentence().startswith("a.py:0: not counted: ")
    assert not place.sentence().endswith(": ")
    assert documentation([tmp_path]).share == 0


@pytest.mark.parametrize("setting", ["fix", "fix-only"])
def test_a_tree_that_asks_for_fixes_is_not_changed(tmp_path, setting):
    """Ruff took `fix = true` from the tree, and rewrote the sources it was to count."""
    root = tree(tmp_path, a="import os\n")
    (tmp_path / "ruff.toml").write_text(f"{setting} = true\n")
    assert score(root, 10) == 0
    assert (root / "a.py").read_text() == "import os\n"


def test_files_that_its_configuration_leaves_out_are_not_without_a_warning(tmp_path):
    root = tree(tmp_path, a="import os\n", b="import os\n", made="import os\n")
    (tmp_path / "ruff.toml").write_text('exclude = ["made.py"]\n')
    (measure,) = (m for m in assess([root]).rules[9].measures if m.tool == "ruff")
    assert (measure.opportunities, len(measure.places)) == (2, 2)
    (tmp_path / "ruff.toml").write_text('exclude = ["*"]\n')
    (measure,) = (m for m in assess([root]).rules[9].measures if m.tool == "ruff")
    assert measure.missing == "its configuration leaves out every file"


def test_where_lizard_is_missing_c_is_not_counted(tmp_path, monkeypatch):
    (tmp_path / "a.c").write_text("int f() { return 0; }\n")
    monkeypatch.setitem(sys.modules, "lizard", None)
    found = assess([tmp_path])
    assert found.unreadable == ()
    lost = {m.rule: m.missing for rule in found.rules for m in rule.measures if m.missing}
    assert lost == dict.fromkeys(c_source.RULES, "not installed")


@pytest.mark.parametrize("name", ["types", "ruff", "functools"])
def test_a_module_of_the_tree_is_not_run_in_place_of_a_librarys(tmp_path, name):
    """Ruff ended with 1 before it began, and every file of the tree was without a warning."""
    root = tree(tmp_path, a="import os\n", **{name: "raise SystemExit(1)\n"})
    found = assess([root]).rules[9]
    assert found.score == Fraction(1, 2)
    assert [place.file for place in found.places] == ["a.py"]


def test_a_tool_that_ends_as_if_it_had_findings_and_lists_none_did_not_count(tmp_path, monkeypatch):
    root = tree(tmp_path, a="x = 1\n")
    monkeypatch.setattr(
        assessment, "find_tool", lambda name: (sys.executable, "-c", "raise OSError")
    )
    (measure,) = (m for m in assess([root]).rules[9].measures if m.tool == "ruff")
    assert measure.missing == "OSError"
