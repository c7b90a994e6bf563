"""The registry of seeded defects: named, sourced, in the catalogue, and alive."""

import subprocess
import sys
from functools import cache
from importlib import import_module

import pytest

from forge_harness.drill.defects import MODULES, all_benign, all_defects
from forge_harness.drill.observe import fingerprint
from forge_harness.policy import load_policy
from forge_harness.subject.loader import load_subject
from forge_harness.subject.reference import ReferenceSubject


@cache
def of_the_reference(observable):
    return fingerprint(observable, ReferenceSubject())


@pytest.mark.usefixtures("trained_once")
@pytest.mark.parametrize("name", all_defects())
def test_a_seeded_defect_differs_from_the_reference(name):
    defect = all_defects()[name]
    seeded = fingerprint(defect.alive, defect.subject())
    assert of_the_reference(defect.alive).startswith("sha256:")
    assert seeded != of_the_reference(defect.alive)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_defects(name):
    module = import_module(f"forge_harness.drill.defects.{name}")
    assert module.DEFECTS
    assert {d.id for d in module.DEFECTS} <= set(all_defects())


def test_every_check_is_in_the_catalogue():
    known = load_policy().by_id
    assert {d.check for d in all_defects().values()} <= set(known)
    named = {check for kind in all_benign().values() for check in kind.checks}
    assert named <= {*known, *(entry.suite for entry in known.values())}


def test_no_two_subjects_share_a_name():
    assert not set(all_defects()) & set(all_benign())


def test_a_defect_is_a_subject_a_user_can_name():
    loaded = load_subject("forge_harness.drill.defects:Q11_absmax_scale")
    assert "Quantizes" in loaded.capabilities
    assert loaded.spec == "forge_harness.drill.defects:Q11_absmax_scale"


def test_an_unknown_defect_is_no_attribute():
    import forge_harness.drill.defects as package

    with pytest.raises(AttributeError, match="Q99"):
        _ = package.Q99_nothing


def test_titles_are_one_line_without_a_full_stop():
    for entry in (*all_defects().values(), *all_benign().values()):
        assert entry.title == entry.title.strip(), entry.id
        assert "\n" not in entry.title, entry.id
        assert not entry.title.endswith("."), entry.id


def test_importing_the_registry_loads_no_torch():
    """The loader imports it in processes that only want a name."""
    code = "import sys, forge_harness.drill.defects; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
