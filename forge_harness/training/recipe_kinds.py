"""What kind of value each setting of a training takes; Python would train with some of the others.

A switch that is "no" is on, a step count of 1.5 is run as 1, and smoothing of NaN is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any, cast

import numpy as np

from forge_harness.errors import ConfigError
from forge_harness.protocols import TrainOptions


def check_kinds(values: Mapping[str, object]) -> None:
    """Refuses the first value of another kind than its setting takes.

    Args:
        values: By setting; one that is not known here is left alone.

    Raises:
        ConfigError: With the setting as its key.
    """
    for key, (expected, is_one) in _KINDS.items():
        if key not in values or (values[key] is None and key in _OPTIONAL):
            continue
        if not is_one(values[key]):
            raise ConfigError(f"{key} is {values[key]!r:.80}; expected {expected}.", key=key)


def plain_options(options: TrainOptions) -> TrainOptions:
    """Returns the same options with Python's own numbers in place of NumPy's.

    A run writes them down, and compares what is asked for with what was.
    """
    values = {field.name: _plain(getattr(options, field.name)) for field in fields(options)}
    return replace(options, **values)


def _plain(value: object) -> Any:  # noqa: ANN401 - as `value` is
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(cast(Real, value))


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= float(cast(Real, value)) <= 1


def _is_beta(value: object) -> bool:
    return _is_share(value) and value != 1


def _are_betas(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_beta, value))


def _are_ids(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(map(_is_whole, value))


_Kind = tuple[str, Callable[[object], bool]]
_WHOLE: _Kind = ("a whole number", _is_whole)
_NUMBER: _Kind = ("a number", _is_number)
_SWITCH: _Kind = ("True or False", _is_switch)
_SHARE: _Kind = ("a number from 0 to 1", _is_share)
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("seed", "steps", "batch_size", "accumulation", "warmup_steps"), _WHOLE),
    **dict.fromkeys(("learning_rate", "weight_decay", "clip_norm"), _NUMBER),
    **dict.fromkeys(("warmup_share", "label_smoothing", "boundary", "final_fraction"), _SHARE),
    **dict.fromkeys(("autocast", "compile"), _SWITCH),
    "residual_gain": ("a finite number", _is_finite),
    "betas": ("two numbers from 0 to below 1", _are_betas),
    "fixed_batch": ("the ids of one sample or more", _are_ids),
}
_OPTIONAL = ("warmup_steps", "fixed_batch")
