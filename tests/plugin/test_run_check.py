"""`run_check`: one check against a subject object, in this process."""

from __future__ import annotations

import sys

import pytest

from forge_harness._pytest.inprocess import Handover, run_check
from forge_harness.errors import NothingCollectedError
from forge_harness.types import Outcome

SOURCE = """
import pytest

@pytest.mark.forge_check("mine.packs", title="It packs", severity="high")
@pytest.mark.parametrize("n", [1, 2])
def test_packs(evidence, subject, forge_profile, forge_seed, n):
    evidence.at_most("size", subject.size * n, limit=4, reason="four at most")
    evidence.record("seed", forge_seed)
    evidence.record("profile", forge_profile)
"""


class Toy:
    name = "toy"

    def __init__(self, size):
        self.size = size

    def pack(self, codes): ...

    def unpack(self, packed, rows): ...


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "test_packs.py").write_text(SOURCE, encoding="utf-8")
    return [tmp_path]


def test_the_worst_item_decides(suite):
    good = run_check("mine.packs", Toy(2), paths=suite, seed=5)
    assert (good.outcome, len(good.items)) == (Outcome.PASS, 2)
    assert (good.evidence("seed"), good.evidence("profile")) == (5, "quick")
    bad = run_check("mine.packs", Toy(3), paths=suite, profile="full")
    assert bad.outcome is Outcome.FAIL
    assert bad.reason == "size is 6, over its limit of 4 (four at most)"
    assert [item.outcome for item in bad.items] == [Outcome.PASS, Outcome.FAIL]
    assert bad.evidence("profile") == "full"


def test_more_arguments_select_items(suite):
    run = run_check("mine.packs", Toy(3), paths=suite, arguments=("-k", "packs[1]"))
    outcomes = {item.nodeid[-3:]: item.outcome for item in run.items}
    assert outcomes == {"[1]": Outcome.PASS, "[2]": Outcome.NOT_MEASURED}


def test_an_unknown_check_is_an_error(suite):
    with pytest.raises(NothingCollectedError, match="carries the check id 'mine\\.pack'"):
        run_check("mine.pack", Toy(1), paths=suite)


def test_suite_modules_do_not_take_everyday_names(suite):
    before = set(sys.modules)
    run_check("mine.packs", Toy(1), paths=suite)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"data", "training", "state", "gates", "environment", "conftest"}


def test_a_check_that_is_nowhere(suite):
    with pytest.raises(NothingCollectedError, match=r"'mine\.packs' is not in the shipped suites"):
        run_check("mine.packs", Toy(1))


def test_what_hands_a_subject_over_can_be_kept_in_a_set():
    """pytest 9.0 keeps every plugin in one, and ended with an internal error."""
    assert len({Handover(None, None), Handover(None, None)}) == 2
