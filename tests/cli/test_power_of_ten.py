from __future__ import annotations

import json

import pytest

BROKEN = "def f(n):\n    return f(n - 1)\n\n\nwhile True:\n    pass\n"


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(BROKEN)
    return tmp_path / "src"


def test_rules_and_categories_are_shown(invoke, tree):
    done = invoke("power-of-ten", tree)
    assert done.exit_code == 0
    assert "every loop has a bound that can be seen" in done.output
    assert "Testing coverage" in done.output
    assert "1 file:" in done.output


def test_the_places_of_a_rule_are_listed(invoke, tree):
    done = invoke("power-of-ten", tree, "--explain", 2)
    assert "a.py:5: `while True` shows no bound" in done.output


def test_a_mean_under_the_limit_is_a_failed_gate(invoke, tree):
    assert invoke("power-of-ten", tree, "--at-least", "0.99").exit_code == 1
    assert invoke("power-of-ten", tree, "--at-least", "0").exit_code == 0


def test_the_document_can_be_recomputed(invoke, tree):
    found = json.loads(invoke("power-of-ten", tree, "--json").output)
    for rule in found["rules"]:
        broken = len(rule["places"])
        if rule["opportunities"]:
            assert rule["score"] == pytest.approx(1 - broken / rule["opportunities"])
        assert broken == sum(measure["broken"] for measure in rule["measures"])


def test_waivers_are_shown(invoke, tree, tmp_path):
    file = tmp_path / "waivers.toml"
    file.write_text(
        '[[waiver]]\nrule = 2\nfile = "a.py"\nowner = "ann"\nexpires = 2999-01-01\nreason = "x"\n'
    )
    done = invoke("power-of-ten", tree, "--waivers", file)
    assert "Waiver of ann until 2999-01-01: rule 2, a.py" in done.output


def test_waivers_that_cover_nothing_are_said(invoke, tree, tmp_path):
    """One that expired, or names a file there is not, costs points whoever wrote it counts on."""
    file, one = tmp_path / "waivers.toml", '[[waiver]]\nrule = 2\nowner = "ann"\nreason = "x"\n'
    file.write_text(
        f'{one}file = "a.py"\nexpires = 2020-01-01\n{one}file = "b.py"\nexpires = 2999-01-01\n'
    )
    done = invoke("power-of-ten", tree, "--waivers", file)
    assert "Waiver of ann until 2020-01-01: rule 2, a.py: expired, covers nothing." in done.output
    assert "Waiver of ann until 2999-01-01: rule 2, b.py: covers nothing." in done.output


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--waivers", "nowhere.toml"]])
def test_what_is_not_there_is_refused(invoke, arguments):
    done = invoke("power-of-ten", *arguments)
    assert done.exit_code == 4
    assert "nowhere" in done.output


@pytest.mark.parametrize("limit", ["nan", "inf", "-inf"])
def test_a_limit_that_is_no_number_gates_nothing(invoke, tree, limit):
    result = invoke("power-of-ten", tree, "--at-least", limit)
    assert result.exit_code == 4
    assert "is not a finite number" in result.stderr
