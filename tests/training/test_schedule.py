from __future__ import annotations

import math

import pytest

from forge_harness.errors import ConfigError
from forge_harness.protocols import ScheduleSpec, TrainOptions
from forge_harness.training import planned_schedule, schedule_spec
from forge_harness.training.schedule import schedule_steps


def rates(**fields: object) -> list[tuple[float, float]]:
    values = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "weight_decay": 0.5, **fields}
    spec = ScheduleSpec(**values)  # type: ignore[arg-type]
    return [(s.learning_rate, s.weight_decay) for s in schedule_steps(spec)]


def test_two_stage_golden() -> None:
    expected = [0.5, 1.0, 0.9, 0.85, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1]
    got = rates(kind="two_stage")
    assert [rate for rate, _ in got] == pytest.approx(expected, rel=1e-15)
    assert [decay for _, decay in got] == [0.5] * 5 + [0.0] * 5


def test_cosine_golden() -> None:
    got = rates(kind="cosine", final_fraction=0.2)
    fall = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(8)]
    assert [rate for rate, _ in got] == pytest.approx([0.5, 1.0, *fall], rel=1e-15)
    assert got[-1][0] == pytest.approx(0.2, rel=1e-15)
    assert {decay for _, decay in got} == {0.5}


def test_horizon_is_the_whole_run_not_the_steps_made() -> None:
    short, long = rates(kind="cosine", total_steps=10), rates(kind="cosine", total_steps=100)
    assert short[9] != long[9]


@pytest.mark.parametrize("task", ["digits", "bytes"])
@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_warmup_ends_within_every_run(task: str, steps: int) -> None:
    options = TrainOptions(steps=steps)
    assert schedule_spec(task, options).warmup_steps < steps
    assert len(planned_schedule(task, options)) == steps


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"warmup_steps": 20}, "warmup_steps"),
        ({"schedule": "linear"}, "schedule"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"boundary": 1.5}, "boundary"),
        ({"warmup": 3}, "warmup"),
        ({"compute": "int4"}, "compute"),
        ({"profile": "slow"}, "profile"),
    ],
)
def test_bad_values_are_refused_by_key(extra: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule_spec("digits", TrainOptions(steps=20, extra=extra))
    assert caught.value.key == key


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(steps=0),
        TrainOptions(seed=-1),
        TrainOptions(seed=2**64),
        TrainOptions(accumulation=0),
        TrainOptions(batch_size=4, accumulation=5),
        TrainOptions(clip_norm=float("nan")),
        TrainOptions(learning_rate=float("inf")),
    ],
)
def test_options_out_of_range_are_refused(options: TrainOptions) -> None:
    with pytest.raises(ConfigError):
        schedule_spec("digits", options)
