"""Evidence: what is recorded, what is refused, and when a limit fails a check."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.canonical import canonical_json
from forge_harness.evidence import Evidence, EvidenceFailure, Recorder, satisfied

finite = st.floats(allow_nan=False, allow_infinity=False)


def recorder(tmp_path=None):
    return Recorder(sink=[], artifact_dir=tmp_path)


@given(value=finite, limit=finite)
def test_limits_include_their_boundary(value, limit):
    assert satisfied(value, limit, "at_most") == (value <= limit)
    assert satisfied(value, limit, "at_least") == (value >= limit)
    assert satisfied(value, [limit, limit], "within") == (value == limit)


@pytest.mark.parametrize("direction", ["at_most", "at_least", "equal", "within", "record"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_non_finite_value_satisfies_no_limit(value, direction):
    assert not satisfied(value, value if direction == "equal" else 1.0, direction)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_fails_even_without_a_limit(value):
    with pytest.raises(EvidenceFailure, match=r"loss is -?(nan|inf)"):
        recorder().record("loss", value)


def test_a_boolean_is_not_a_number():
    assert not satisfied(True, 1, "at_most")
    assert not satisfied(True, 1, "equal")
    assert satisfied(True, True, "equal")


def test_a_missed_limit_fails_in_one_sentence_and_is_kept():
    evidence = recorder()
    with pytest.raises(EvidenceFailure) as failure:
        evidence.at_most("ratio", 0.8, limit=0.5, unit="s", reason="five steps halve the loss")
    assert str(failure.value) == (
        "ratio is 0.8 s, over its limit of 0.5 s (five steps halve the loss)"
    )
    assert evidence.recorded[0].value == 0.8


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("direction", "limit", "said"),
    [
        ("at_least", 5.0, "expected at least 5 x"),
        ("at_most", 5.0, "expected at most 5 x"),
        ("within", [1.0, 2.0], "expected within [1, 2] x"),
    ],
)
def test_a_non_finite_value_is_on_no_side_of_its_limit(value, direction, limit, said):
    evidence = Evidence(name="v", value=value, unit="x", limit=limit, direction=direction)
    assert evidence.sentence() == f"v is {value} x, not finite; {said}"


@pytest.mark.parametrize(
    ("direction", "value", "limit", "said"),
    [
        ("equal", 0.1 + 0.2, 0.3, "v is 0.30000000000000004, expected 0.3"),
        ("at_least", 0.9899999999, 0.99, "v is 0.9899999999, under its limit of 0.99"),
        ("within", 2.0000000001, [1.0, 2.0], "v is 2.0000000001, outside [1.0, 2.0]"),
        ("equal", "1", 1, "v is '1', expected 1"),
    ],
)
def test_a_value_just_past_its_limit_does_not_read_as_the_limit(direction, value, limit, said):
    assert Evidence(name="v", value=value, limit=limit, direction=direction).sentence() == said


def test_an_empty_text_shows_in_the_sentence():
    lost = Evidence(name="v", value="", unit="modules", limit="a, b", direction="equal")
    assert lost.sentence() == "v is no modules, expected a, b modules"
    extra = Evidence(name="v", value="a", unit="modules", limit="", direction="equal")
    assert extra.sentence() == "v is a modules, expected no modules"
    assert Evidence(name="v", value="a", limit="", direction="equal").sentence() == (
        "v is a, expected empty"
    )


def test_a_missed_warning_limit_does_not_fail():
    evidence = recorder()
    evidence.at_most("noise", 2.0, limit=1.0, reason="stated noise", level="warn")
    assert not evidence.recorded[0].ok()


def test_numpy_and_torch_scalars_become_plain_numbers():
    import numpy as np
    import torch

    evidence = recorder()
    evidence.record("a", np.float32(0.5))
    evidence.record("b", torch.tensor(3))
    assert [type(entry.value) for entry in evidence.recorded] == [float, int]
    canonical_json([payload for _, payload in evidence.sink])


def test_what_is_kept_has_exactly_the_types_that_cross_processes():
    from enum import IntEnum

    import numpy as np
    import torch

    class Code(IntEnum):
        FOUR = 4

    evidence = recorder()
    reason = torch.__version__  # a subclass of str
    evidence.record("version", torch.__version__, reason=reason, unit=type(reason)("v"))
    evidence.at_most("ratio", np.float64(0.5), limit=np.float64(1.0), reason=reason)
    evidence.equal("code", Code.FOUR, expected=Code.FOUR, reason=reason)
    evidence.equal("flag", np.bool_(True), expected=True, reason=reason)
    for _, payload in evidence.sink:
        types = {type(value) for value in payload.values()}
        assert types <= {str, float, int, bool, type(None)}, payload
    import execnet.gateway_base

    execnet.gateway_base.dumps(evidence.sink)


def test_an_array_is_refused_by_name():
    import numpy as np

    with pytest.raises(TypeError, match="'weights' is an array"):
        recorder().record("weights", np.zeros(3))


def test_the_same_name_twice_is_refused():
    evidence = recorder()
    evidence.record("a", 1)
    with pytest.raises(ValueError, match="recorded twice"):
        evidence.record("a", 2)


def test_too_many_or_non_finite_samples_are_refused():
    with pytest.raises(ValueError, match="at most 2000"):
        recorder().record("a", 1.0, samples=[0.0] * 2001)
    with pytest.raises(ValueError, match="non-finite samples"):
        recorder().record("a", 1.0, samples=[math.nan])


def test_an_integer_json_cannot_carry_becomes_text():
    evidence = recorder()
    evidence.record("bytes", 2**60)
    assert evidence.recorded[0].value == str(2**60)


def test_threads_may_store_one_artifact_at_once(tmp_path):
    source = tmp_path / "curve.bin"
    source.write_bytes(b"x" * 4_000_000)
    with ThreadPoolExecutor(8) as pool:
        stores = [
            pool.submit(recorder(tmp_path / "out").artifact, "curve", source) for _ in range(24)
        ]
    for store in stores:
        store.result()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "out/sha256").iterdir()] == [digest]


def test_an_artifact_is_stored_under_its_digest(tmp_path):
    source = tmp_path / "curve.json"
    source.write_text("[1, 2]")
    evidence = recorder(tmp_path / "evidence")
    evidence.artifact("curve", source)
    stored = evidence.recorded[0].artifact
    assert stored is not None
    assert (tmp_path / stored).read_text() == "[1, 2]"
    assert stored.endswith(evidence.recorded[0].value.removeprefix("sha256:"))


def test_evidence_defaults_have_no_limit():
    assert Evidence(name="a", value=1).ok()


@pytest.mark.parametrize("value", [2**53, 10**17, -(10**17), 10**400])
def test_an_integer_of_any_size_is_on_one_side_of_a_bound(value):
    evidence = recorder()
    if abs(value) < 10**300:
        evidence.at_most("most", value, limit=value, reason="r")
        evidence.at_least("least", value, limit=value - abs(value) // 10, reason="r")
        evidence.within("within", value, low=-1e18, high=1e18, reason="r")
        assert [kept.ok() for kept in evidence.recorded] == [True] * 3
        with pytest.raises(EvidenceFailure):
            evidence.at_most("over", value, limit=value - abs(value) // 10, reason="r")
        assert all(canonical_json(kept.value) for kept in evidence.recorded)
    else:
        with pytest.raises(EvidenceFailure, match="huge is inf"):
            evidence.at_least("huge", value, limit=1, reason="r")


def test_text_is_on_no_side_of_a_bound():
    with pytest.raises(EvidenceFailure):
        recorder().at_most("a", "5", limit=10, reason="r")
