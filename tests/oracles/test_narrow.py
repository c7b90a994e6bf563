"""Values as a product in half precision takes them, against torch's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge_harness import oracles

FORMATS = [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]


@pytest.mark.parametrize(("dtype", "roundoff"), FORMATS, ids=str)
@given(values=st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=20))
def test_values_are_rounded_as_torch_does(dtype, roundoff, values):
    given_ = np.array([*values, *(-v for v in values), 0.0])
    found = oracles.narrowed(given_, roundoff)
    expected = torch.tensor(given_, dtype=torch.float32).to(dtype)
    assert np.array_equal(found.values, expected.double().numpy())


@pytest.mark.parametrize(("dtype", "roundoff"), FORMATS, ids=str)
def test_at_a_tie_either_neighbour_is_allowed(dtype, roundoff):
    step = float(torch.finfo(dtype).eps)
    values = np.array(
        [1.0, 1 + step / 2, 1 + step / 2 * (1 + 1e-2), 1 + 3 * step / 2, -(1 + step / 2)]
    )
    found = oracles.narrowed(values, roundoff)
    assert found.values.tolist() == [1.0, 1.0, 1 + step, 1 + 2 * step, -1.0]
    assert found.slack.tolist() == [0.0, step, 0.0, step, step]
