from __future__ import annotations

import pytest

from forge_harness.errors import StateError
from forge_harness.integration.state_kinds import (
    KINDS,
    StateKind,
    check_migration,
    check_value,
    checked_name,
    known_kind,
    phase_name,
)


@pytest.mark.parametrize("phase", [5, "5", "phase5", "Phase 5", "phase-5", "PHASE_5", " phase5 "])
def test_a_phase_has_one_spelling(phase: str | int) -> None:
    assert phase_name(phase) == "phase5"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/../b", "a//b", "a b", "-x", "a\nb", "x" * 201, "é"]
)
def test_names_that_could_leave_the_store_are_refused(name: str) -> None:
    with pytest.raises(StateError, match="is no name of a state"):
        checked_name(name, "name")


def test_an_unknown_kind_names_the_nearest_and_the_remedy() -> None:
    with pytest.raises(StateError, match=r"Did you mean 'checkpoint'\?.*StateKind"):
        known_kind("chekpoint", KINDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.9", None])
def test_metrics_are_finite_numbers(value: object) -> None:
    with pytest.raises(StateError, match="expected a finite number"):
        check_value(KINDS["metrics"], {"accuracy": value}, "phase5/m")
    check_value(KINDS["metrics"], {"accuracy": 0, "loss": 0.0}, "phase5/m")
    check_value(KINDS["metrics"], b"opaque", "phase5/m")


def test_required_keys() -> None:
    kind = StateKind(name="recipe", holds="a recipe", required=("steps", "seed"))
    with pytest.raises(StateError, match="lacks 'seed'"):
        check_value(kind, {"steps": 0}, "phase5/r")


def test_states_move_forward_and_only_where_they_are_taken() -> None:
    model, optimizer = KINDS["model"], KINDS["optimizer"]
    check_migration(model, "phase4", "phase5")
    check_migration(model, "phase4", "phase6")
    check_migration(optimizer, "phase4", "phase5")
    check_migration(optimizer, "phase5", "archive")
    with pytest.raises(StateError, match="forward only"):
        check_migration(model, "phase6", "phase5")
    with pytest.raises(StateError, match="already"):
        check_migration(model, "phase5", "phase5")
    with pytest.raises(StateError, match="'phase6' does not take states of kind 'optimizer'"):
        check_migration(optimizer, "phase5", "phase6")
