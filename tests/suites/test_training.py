"""Each training check goes red for a seeded defect, for its own reason, and only then."""

import pytest

from forge_harness.policy import load_policy
from forge_harness.protocols import QualityRun, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .deployment_defects import with_digits_alone
from .training_defects import (
    AccumulatesInBf16,
    ClearsEachMicroBatch,
    Estimator,
    ExportsAverage,
    HalfTheHorizon,
    LeaksThroughScale,
    MeanOfMeans,
    MovingAverage,
    NoAverageOverRanks,
    NominalCount,
    OneSeedForAll,
    OtherSamples,
    RoundsInTheGraph,
    SessionDefect,
    ShuffledLabels,
    SlowStep,
    TornSnapshot,
    Undivided,
    UnseededWeights,
    as_if_contiguous,
    as_kind,
    before_each_step,
    clips_each_parameter,
    coupled_decay,
    cuts_gradient,
    decays_everything,
    divides_validation_loss,
    doubled_decay,
    drops_moments,
    evaluates_latents,
    evaluation_moves_data,
    forgets_betas,
    forgets_parameter,
    fresh_generators,
    gradient_every_other_step,
    guards_the_loss_only,
    hides_optimizer,
    keeps_gradients,
    keeps_latents_in_bf16,
    masked_by_clip,
    moments_in_bf16,
    never_clips,
    only_decay_moves_it,
    peak_rate_in_update,
    rate_of_next_step,
    replaces_parameter,
    reports,
    restarts_epoch,
    restarts_schedule,
    rounds_latents,
    scales_gradients,
    skips_a_sample,
    skips_in_silence,
    stays_in_evaluation_mode,
    unguarded,
)

CHECKS = sorted(e.id for e in load_policy().catalogue if e.suite == "training")


def run(arm, seed, accuracy, first_at=60, finite=True):
    """One row of a study whose curve reaches its final accuracy at a step."""
    curve = tuple(
        (step, 2.0 - step / 400, accuracy if step >= first_at else 0.3)
        for step in range(29, 300, 30)
    )
    return QualityRun(
        **{"task": "digits", "arm": arm, "seed": seed, "steps": 300, "learning_rate": 1e-3},
        **{"parameters": 1, "accuracy": accuracy, "loss": 0.1, "finite": finite, "seconds": 1.0},
        **{"block_correct": (9,), "block_size": (10,), "curve": curve, "peak_rss_bytes": 1},
        data_digest="sha256:0",
    )


def study(**ternary):
    defaults = {"accuracy": [0.97] * 10, "first_at": 90, "finite": True} | ternary
    pairs = enumerate(defaults.pop("accuracy"))
    return [run("full", seed, 0.98) for seed in range(10)] + [
        run("ternary", seed, accuracy, **defaults) for seed, accuracy in pairs
    ]


DEFECTS = {
    "G01_no_estimator": ("ste_input_gradient", RoundsInTheGraph(), "error"),
    "G07_latent_weight": (
        "ste_input_gradient",
        Estimator(input_grad=lambda g, x, w, xq, wq: g @ w),
        "error",
    ),
    "G09_first_upstream_entry": (
        "ste_input_gradient",
        Estimator(read=lambda g: g.flatten()[0].expand(g.shape).clone()),
        "error",
    ),
    "G12_assumes_contiguous": (
        "ste_input_gradient",
        Estimator(read=as_if_contiguous),
        "transposed",
    ),
    "G13_writes_upstream": (
        "ste_input_gradient",
        Estimator(read=lambda g: g.mul_(1.0 + 1e-3) if g.is_contiguous() else g),
        "upstream_changed",
    ),
    "G01_no_weight_estimator": ("ste_weight_gradient", RoundsInTheGraph(), "error"),
    "G03_clipped": (
        "ste_weight_gradient",
        Estimator(weight_grad=masked_by_clip),
        "error",
    ),
    "G07_raw_activations": (
        "ste_weight_gradient",
        Estimator(weight_grad=lambda g, x, w, xq, wq: g.t() @ x),
        "quantize to zero",
    ),
    "G08_leaks_through_scale": ("ste_weight_gradient", LeaksThroughScale(), "error"),
    "G11_bf16_gradient": (
        "ste_weight_gradient",
        Estimator(weight_grad=lambda g, x, w, xq, wq: (g.t() @ xq).bfloat16().float()),
        "error",
    ),
    "G10_bias_over_batch_only": (
        "ste_weight_gradient",
        Estimator(bias_grad=lambda g: g.flatten(0, -2).mean(0)),
        "bias_error",
    ),
    "G01_one_layer_detached": (
        "gradient_reaches_all",
        SessionDefect(cuts_gradient),
        "parameters_without_gradient",
    ),
    "G05_gradient_now_and_then": (
        "gradient_reaches_all",
        SessionDefect(gradient_every_other_step),
        "parameters_without_gradient",
    ),
    "parameter_replaced": (
        "parameters_move",
        SessionDefect(replaces_parameter),
        "parameters_not_owned",
    ),
    "parameter_forgotten": (
        "parameters_move",
        SessionDefect(forgets_parameter),
        "parameters_not_owned",
    ),
    "only_decay": (
        "parameters_move",
        SessionDefect(only_decay_moves_it),
        "parameters_only_decaying",
    ),
    "T10_bf16_latents": (
        "parameters_move",
        SessionDefect(keeps_latents_in_bf16),
        "moved_at_low_rate",
    ),
    "D05_shuffled_labels": ("overfit_one_batch", ShuffledLabels(), "loss_ratio"),
    "other_samples": ("overfit_one_batch", OtherSamples(), "other_samples"),
    "G01_loss_too_high": ("loss_within_band", RoundsInTheGraph(), "loss is"),
    "T16_loss_too_low": (
        "loss_within_band",
        SessionDefect(reports(loss=lambda loss: loss / 2)),
        "loss is",
    ),
    "T01_undivided": (
        "accumulation_equivalence",
        SessionDefect(as_kind(Undivided)),
        "gradient_difference_4",
    ),
    "T01_mean_of_means": (
        "accumulation_equivalence",
        SessionDefect(as_kind(MeanOfMeans)),
        "gradient_difference_4",
    ),
    "T07_zero_grad_in_the_loop": (
        "accumulation_equivalence",
        SessionDefect(as_kind(ClearsEachMicroBatch)),
        "gradient_difference_4",
    ),
    "T07_never_cleared": (
        "accumulation_equivalence",
        SessionDefect(keeps_gradients),
        "gradient_difference_1",
    ),
    "T18_moving_average": (
        "accumulation_equivalence",
        SessionDefect(as_kind(MovingAverage)),
        "gradient_difference_4",
    ),
    "G11_bf16_buffers": (
        "accumulation_equivalence",
        SessionDefect(as_kind(AccumulatesInBf16)),
        "gradient_difference",
    ),
    "T03_loss_scaled": (
        "accumulation_equivalence",
        SessionDefect(reports(loss=lambda loss: loss * 21 / 22)),
        "loss_difference_1",
    ),
    "T01_nominal_count": (
        "partial_window",
        SessionDefect(as_kind(NominalCount)),
        "gradient_difference",
    ),
    "T04_never_clipped": ("clip_effective", SessionDefect(never_clips), "norm_at_optimizer"),
    "T19_clips_by_parameter": (
        "clip_effective",
        SessionDefect(clips_each_parameter),
        "norm_kept",
    ),
    "T05_clips_scaled": ("clip_effective", SessionDefect(scales_gradients(1e-3)), "norm_kept"),
    "T19_norm_of_one_shard": (
        "clip_effective",
        SessionDefect(reports(grad_norm=lambda norm: norm / 2)),
        "reported_norm_error",
    ),
    "T12_rate_of_next_step": (
        "schedule_trace",
        SessionDefect(before_each_step(rate_of_next_step)),
        "optimizer_error",
    ),
    "T13_rate_not_used": ("schedule_trace", SessionDefect(peak_rate_in_update), "update_error"),
    "T21_half_horizon": ("schedule_trace", HalfTheHorizon(), "plan_error"),
    "T08_decays_everything": ("decay_groups", SessionDefect(decays_everything), "exempt_decayed"),
    "T09_coupled": ("decay_groups", SessionDefect(before_each_step(coupled_decay)), "decay_error"),
    "T09_doubled": ("decay_groups", SessionDefect(before_each_step(doubled_decay)), "decay_error"),
    "V05_unseeded": ("repeat_bit_identical", UnseededWeights(), "first_different_step"),
    "V05_seed_ignored": ("repeat_bit_identical", OneSeedForAll(), "tensors_of_another_seed"),
    "C01_moments_dropped": (
        "resume_bit_identical",
        SessionDefect(resumed=drops_moments),
        "first_different_step",
    ),
    "C04_epoch_restarted": (
        "resume_bit_identical",
        SessionDefect(resumed=restarts_epoch),
        "sample_ids",
    ),
    "C07_warmup_repeats": (
        "resume_bit_identical",
        SessionDefect(resumed=restarts_schedule),
        "first_different_step",
    ),
    "C19_latents_rounded": (
        "resume_bit_identical",
        SessionDefect(resumed=rounds_latents),
        "metrics_at_once",
    ),
    "C06_sample_lost": (
        "resume_twice_bit_identical",
        SessionDefect(resumed=skips_a_sample),
        "sample_ids",
    ),
    "C01_moments_empty": (
        "optimizer_state_exact",
        SessionDefect(resumed=drops_moments),
        "different_entries",
    ),
    "C19_moments_in_bf16": (
        "optimizer_state_exact",
        SessionDefect(resumed=moments_in_bf16),
        "different_entries",
    ),
    "C17_betas_default": (
        "optimizer_state_exact",
        SessionDefect(resumed=forgets_betas),
        "different_entries",
    ),
    "C03_generators_not_restored": (
        "every_state_saved",
        SessionDefect(resumed=fresh_generators),
        "not_restored",
    ),
    "C08_state_incomplete": (
        "every_state_saved",
        SessionDefect(hides_optimizer),
        "uncovered_tensors",
    ),
    "C08_changed_by_saving": (
        "every_state_saved",
        SessionDefect(saving=rounds_latents),
        "changed_by_saving",
    ),
    "C20_torn_snapshot": ("every_state_saved", TornSnapshot(), "not_restored"),
    "no_guard": ("non_finite_stops", SessionDefect(unguarded), "nan_in_one_gradient.changed"),
    "guard_on_loss_only": (
        "non_finite_stops",
        SessionDefect(guards_the_loss_only),
        "nan_in_one_gradient.changed",
    ),
    "skips_in_silence": (
        "non_finite_stops",
        SessionDefect(skips_in_silence),
        "nan_in_one_gradient.reported",
    ),
    "ranks_not_averaged": ("distributed_equivalence", NoAverageOverRanks(), "different_tensors"),
    "L06_evaluates_latents": (
        "eval_is_quantized",
        with_digits_alone(SessionDefect(evaluates_latents)),
        "loss_difference",
    ),
    "T15_mode_left": (
        "eval_is_quantized",
        with_digits_alone(SessionDefect(stays_in_evaluation_mode)),
        "modes_left_changed",
    ),
    "T16_loss_divided": (
        "eval_is_quantized",
        with_digits_alone(SessionDefect(divides_validation_loss)),
        "loss_with_accumulation",
    ),
    "T20_exports_average": (
        "eval_is_quantized",
        with_digits_alone(ExportsAverage()),
        "loss_difference",
    ),
    "evaluating_moves_data": (
        "eval_is_quantized",
        with_digits_alone(SessionDefect(evaluation_moves_data)),
        "changed_by_evaluating",
    ),
    "R11_clock_stopped_early": (
        "throughput_recorded",
        SessionDefect(reports(seconds=lambda seconds: seconds / 10)),
        "reported_share_of_time",
    ),
}
"""Test id (with the number of the defect list) -> check, subject, what the reason must name."""

STUDIES = {
    "half_diverge": ("convergence_rate", study(accuracy=[0.97, 0.5] * 5), "digits.rate is 0.5"),
    "never_finite": ("convergence_rate", study(finite=False), "digits.rate is 0"),
    "no_ternary_run": ("convergence_rate", study(accuracy=[]), "digits.rate is nan"),
    "late": ("steps_to_quality", study(first_at=260), "steps_ratio is 3"),
    "never_there": ("steps_to_quality", study(accuracy=[0.5] * 10), "steps_ratio is inf"),
}


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"training.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize(("check", "runs", "reason"), STUDIES.values(), ids=STUDIES)
def test_study_turns_the_check_red(run_check, check, runs, reason):
    result = run_check(f"training.{check}", ReferenceSubject(), study=runs)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize("check", CHECKS)
def test_reference_is_green(run_check, check):
    result = run_check(check, ReferenceSubject(), study=study())
    assert result.outcome is Outcome.PASS, result.reason


def test_every_check_has_a_defect():
    seeded = [entry[0] for entry in (*DEFECTS.values(), *STUDIES.values())]
    assert {f"training.{check}" for check in seeded} == set(CHECKS)


def test_slow_training_is_over_its_limit(run_check):
    result = run_check("performance.training_overhead", SlowStep())
    assert result.outcome is Outcome.FAIL, result.reason
    assert "overhead_ratio" in result.reason


def test_sessions_of_the_defects_still_train():
    """Defects must be alive but not crash: a check that errors proves nothing."""
    for _, subject, _ in DEFECTS.values():
        session = subject.session("digits", TrainOptions(steps=3))
        for _ in range(3):
            assert session.step().step >= 0


class DigitsOnly(ReferenceSubject):
    def tasks(self):
        return ("digits",)


def cost_of(monkeypatch, run_check, ratio):
    """Runs the check on a clock under which pair i of a setting costs ratio(i) to 1."""
    from forge_harness.scoring import statistics

    true = statistics.paired_median_bounds

    def bounds(candidate, base, *, error):
        return true([ratio(i) for i in range(len(base))], [1.0] * len(base), error=error)

    monkeypatch.setattr(statistics, "paired_median_bounds", bounds)
    return run_check("performance.training_overhead", DigitsOnly())


def test_an_undecided_cost_is_measured_once_more_and_then_said_to_be_open(monkeypatch, run_check):
    noisy = cost_of(monkeypatch, run_check, lambda i: 0.75 if i % 2 else 0.95)
    assert noisy.outcome is Outcome.NOT_MEASURED, noisy.reason
    assert "after 40 pairs" in noisy.reason


def test_the_planned_extension_decides(monkeypatch, run_check):
    settled = cost_of(monkeypatch, run_check, lambda i: 0.7 if i % 4 else 0.9)
    assert settled.outcome is Outcome.PASS, settled.reason
