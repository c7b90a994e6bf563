from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from forge_harness.errors import ConfigError
from forge_harness.protocols import TrainOptions
from forge_harness.training import resolve_recipe


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("steps", 1.5, "a whole number"),
        ("steps", "3", "a whole number"),
        ("batch_size", 2.0, "a whole number"),
        ("accumulation", True, "a whole number"),
        ("learning_rate", "3e-3", "a number"),
        ("clip_norm", True, "a number"),
        ("fixed_batch", (1.5,), "the ids of one sample or more"),
        ("fixed_batch", (), "the ids of one sample or more"),
        ("fixed_batch", 3, "the ids of one sample or more"),
    ],
)
def test_options_of_another_kind_are_refused(key: str, value: object, expected: str) -> None:
    """Some were trained with: 1.5 steps as one, a sample 1.5 as sample 1."""
    options = TrainOptions(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{key} is .*; expected {expected}") as caught:
        resolve_recipe("digits", options)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("warmup_steps", 2.5, "a whole number"),
        ("weight_decay", "0.1", "a number"),
        ("warmup_share", nan, "a number from 0 to 1"),
        ("label_smoothing", nan, "a number from 0 to 1"),
        ("label_smoothing", -0.1, "a number from 0 to 1"),
        ("label_smoothing", 1.5, "a number from 0 to 1"),
        ("boundary", None, "a number from 0 to 1"),
        ("residual_gain", inf, "a finite number"),
        ("compile", "no", "True or False"),
        ("autocast", 1, "True or False"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("betas", (0.9,), "two numbers from 0 to below 1"),
        ("betas", (nan, 0.9), "two numbers from 0 to below 1"),
        ("betas", "ab", "two numbers from 0 to below 1"),
    ],
)
def test_extras_of_another_kind_are_refused(key: str, value: object, expected: str) -> None:
    """Compilation was on that was said "no" to, and smoothing of NaN was none."""
    with pytest.raises(ConfigError, match=f"^{key} is .*; expected {expected}") as caught:
        resolve_recipe("digits", TrainOptions(extra={key: value}))
    assert caught.value.key == key


def test_numbers_of_numpy_and_lists_of_json_are_taken() -> None:
    options = TrainOptions(
        seed=np.int64(3),
        steps=np.int32(40),
        learning_rate=np.float32(0.5),
        clip_norm=inf,
        fixed_batch=[0, 1],  # type: ignore[arg-type]
        extra={"betas": [0, 0.9], "warmup_steps": None, "weight_decay": 0},
    )
    assert resolve_recipe("digits", options).learning_rate == 0.5
