"""What is served of a package, and what is said of one that is not quite that."""

import pytest

from forge_harness.serving.package import load_served

from .support import DIGITS


@pytest.mark.parametrize(("name", "said"), [("legacy", 1), ("v1.0", 0), ("v0.9", 0)])
def test_weights_that_are_quantized_as_they_are_read_are_not_served_in_silence(caplog, name, said):
    load_served(DIGITS.parent / name)
    told = [r.getMessage() for r in caplog.records if "were quantized as they were read" in r.msg]
    assert len(told) == said
    assert all(str(DIGITS.parent / name) in each for each in told)
