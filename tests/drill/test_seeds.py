"""Modules of seeds: the shipped ones, and names that are subjects."""

import pytest

from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects import all_benign, all_defects
from forge_harness.drill.seeds import load_seeds, subjects_of


def test_the_shipped_seeds_are_there():
    seeds = load_seeds()
    assert seeds.subject_of("Q12_sign") == "forge_harness.drill.defects:Q12_sign"
    assert seeds.defects == all_defects()
    assert seeds.benign == all_benign()


def test_ids_are_names_of_subjects():
    fields = {"title": "x", "stage": Stage.DATA, "check": "a.b", "shows": "x", "alive": repr}
    attribute = subjects_of([Defect(id="one", subject=int, **fields)])
    assert attribute("one") is int
    with pytest.raises(AttributeError, match="'two'"):
        attribute("two")
