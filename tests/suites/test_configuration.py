"""Each configuration check goes red for its own reason."""

from dataclasses import replace
from functools import partial

import pytest

from forge_harness.drill.defects import all_benign, configuration, defects_of
from forge_harness.drill.defects.recipe import PlansAnother
from forge_harness.drill.defects.stated import BENIGN as SOUND_EXPORTS
from forge_harness.subject.reference import ReferenceSubject

CHECKS = [
    "schema_valid",
    "unknown_key_refused",
    "explicit_zero_kept",
    "precedence",
    "ranges",
    "shape_divisibility",
    "quantization_consistent",
    "schedule_golden",
    "warmup_within_run",
    "seed_fixed",
    "paths_exist",
    "no_secret_in_config",
    "digest_stable",
    "round_trip",
    "policy_separate",
]
DEFECTS = defects_of("configuration")


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_configuration_is_sound(run_check, name):
    run = run_check(f"configuration.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_a_defect_turns_its_check_red(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome == "fail", run.reason
    assert defect.shows in run.reason


def test_every_check_has_a_defect():
    assert {defect.check for defect in DEFECTS} == {f"configuration.{name}" for name in CHECKS}


class PacksAnotherWay(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), packing="tl2")


@pytest.mark.parametrize("name", CHECKS)
def test_the_project_s_own_file_takes_no_part(run_check, monkeypatch, tmp_path, name):
    # Three heads rule out the default width, 50 steps the default warmup of longer runs.
    (tmp_path / "forge.toml").write_text(
        "[run]\nseed = 3\n[model]\nwidth = 96\nheads = 3\n[train]\nsteps = 50\nwarmup_steps = 10\n"
    )
    monkeypatch.chdir(tmp_path)
    run = run_check(f"configuration.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_without_a_configuration_is_no_error(run_check, name):
    class Nothing:
        name = "nothing"

    run = run_check(f"configuration.{name}", Nothing())
    assert run.outcome in {"pass", "not_applicable", "not_measured"}, run.reason


def test_a_blind_secret_scan_fails(run_check, monkeypatch):
    from forge_harness.probes import secrets

    monkeypatch.setattr(secrets, "suspicious", lambda values: {})
    run = run_check("configuration.no_secret_in_config")
    assert run.outcome == "fail"
    assert "planted_values_found is 0" in run.reason


def test_a_stale_policy_digest_fails(run_check, monkeypatch):
    from forge_harness.policy import Policy

    monkeypatch.setattr(Policy, "digest", "sha256:stale")
    run = run_check("configuration.policy_separate")
    assert run.outcome == "fail"
    assert "threshold_moves_policy_digest is False" in run.reason


def test_a_configuration_without_shapes_is_not_measured(run_check):
    class NoShapes(ReferenceSubject):
        def config_schema(self):
            schema = dict(super().config_schema())
            properties = {k: v for k, v in schema["properties"].items() if k != "model"}
            return {**schema, "properties": properties}

    run = run_check("configuration.shape_divisibility", NoShapes())
    assert run.outcome == "not_measured"
    assert "no width and heads" in run.reason


class NoSeed(ReferenceSubject):
    def config_schema(self):
        schema = super().config_schema()
        run = dict(schema["$defs"]["RunConfig"])
        run["properties"] = {k: v for k, v in run["properties"].items() if k != "seed"}
        return {**schema, "$defs": {**schema["$defs"], "RunConfig": run}}


def test_a_configuration_without_a_seed_is_not_measured(run_check):
    run = run_check("configuration.seed_fixed", NoSeed())
    assert run.outcome == "not_measured"
    assert "no key named seed" in run.reason


class OneChoice(ReferenceSubject):
    """A configuration of one key, which takes one of two words."""

    def config_schema(self):
        mode = {"type": "string", "enum": ["a", "b"]}
        return {"properties": {"run": {"type": "object", "properties": {"mode": mode}}}}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("explicit_zero_kept", "no key of the configuration has a legal falsy value"),
        ("precedence", "no key of the configuration takes three values on its own"),
        ("ranges", "the schema of the configuration states no bound"),
    ],
)
def test_a_configuration_without_such_a_key_is_not_measured(run_check, name, reason):
    run = run_check(f"configuration.{name}", OneChoice())
    assert run.outcome == "not_measured"
    assert reason in run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_that_only_configures_is_measured_as_far_as_it_goes(run_check, name):
    run = run_check(f"configuration.{name}", configuration.ConfiguresOnly())
    assert run.outcome in {"pass", "not_measured"}, run.reason


def test_stored_weights_are_found_in_the_export(run_check):
    run = run_check("configuration.quantization_consistent")
    assert run.evidence("digits_stored_codes") == 6
    assert run.evidence("digits_stored_scales") == 6


def test_a_prefix_of_the_writer_hides_nothing_and_is_no_error(run_check):
    (kind,) = SOUND_EXPORTS
    run = run_check("configuration.quantization_consistent", kind.subject())
    assert run.outcome == "pass", run.reason
    assert run.evidence("bytes_stored_codes") == 14


def test_a_layout_without_an_oracle_is_not_measured(run_check):
    run = run_check("configuration.quantization_consistent", PacksAnotherWay())
    assert run.outcome == "not_measured"
    assert "packing tl2; only i2-rowblock can be read here" in run.reason


SOUND_SCHEDULES = [
    (kind, check)
    for kind in ("schedule_of_its_own", "refuses_short_runs")
    for check in all_benign()[kind].checks
    if check.startswith("configuration.")
]


@pytest.mark.parametrize(("kind", "check"), SOUND_SCHEDULES)
def test_a_sound_schedule_of_another_kind_is_no_false_alarm(run_check, kind, check):
    run = run_check(check, all_benign()[kind].subject())
    assert run.outcome == "pass", run.reason


def test_a_schedule_without_a_formula_is_not_measured(run_check):
    run = run_check("configuration.schedule_golden", all_benign()["schedule_of_its_own"].subject())
    assert run.outcome == "not_measured"
    assert "no formula of the schedule of bytes: 'of_its_own', digits: 'of_its_own'" in run.reason
    assert run.evidence("plans_of_wrong_length") == 0


def rounded_elsewhere(share, plan):
    peak = max(step.learning_rate for step in plan)
    return [replace(step, learning_rate=step.learning_rate + share * peak) for step in plan]


def test_a_formula_written_in_another_way_is_no_false_alarm(run_check):
    """At the end of a cosine to zero rounding is large beside the rates, not beside the peak."""
    subject = PlansAnother(partial(rounded_elsewhere, 2.0**-52))
    run = run_check("configuration.schedule_golden", subject)
    assert run.outcome == "pass", run.reason
    assert 1e-16 < run.evidence("relative_error") < 5e-16


def test_what_is_more_than_rounding_is_found(run_check):
    run = run_check(
        "configuration.schedule_golden", PlansAnother(partial(rounded_elsewhere, 1e-13))
    )
    assert run.outcome == "fail"
    assert "relative_error is 1.0" in run.reason


def test_a_warmup_of_one_step_fits_a_run_of_one(run_check):
    subject = PlansAnother(spec=lambda s: replace(s, warmup_steps=max(1, s.total_steps // 10)))
    run = run_check("configuration.warmup_within_run", subject)
    assert run.outcome == "pass", run.reason


def test_a_warmup_as_long_as_the_run_is_found(run_check):
    subject = PlansAnother(spec=lambda s: replace(s, warmup_steps=max(1, s.total_steps)))
    run = run_check("configuration.warmup_within_run", subject)
    assert run.outcome == "fail"
    assert "digits: 2 of 2 steps" in run.reason
    assert "1 of 1 steps" not in run.reason


def test_a_subject_that_refuses_every_run_is_not_measured(run_check):
    class NeverTrains(ReferenceSubject):
        def schedule_spec(self, task, options):
            raise ValueError("too short")

    run = run_check("configuration.warmup_within_run", NeverTrains())
    assert run.outcome == "not_measured"
    assert "refuses every run" in run.reason
