import json

from hypothesis import given
from hypothesis import strategies as st

from forge_harness.load.driver import Base, measure
from forge_harness.load.plan import LoadPlan
from forge_harness.serving.streaming import TokenText, text_of

from .support import FAULTY, running


@given(st.lists(st.integers(0, 300)))
def test_a_stream_adds_up_to_the_text_of_all_its_tokens(tokens):
    text = TokenText()
    pieces = [text.add(token) for token in tokens]
    whole = bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
    assert "".join(pieces) + text.end() == whole == text_of(tokens)


def test_a_character_comes_when_its_last_byte_is_there():
    text = TokenText()
    assert [text.add(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert text.end() == ""


def test_a_load_counts_streams_that_end_late_as_the_server_does(byte_lm, tmp_path):
    """They were errors under status 200, which the server had not counted: the run was INVALID."""
    asked = {"prompt": "x", "max_tokens": 90, "stream": True}
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"path": "/v1/completions", "body": asked}))
    with running("--step-s", 0.05, "--deadline-s", 0.4, script=FAULTY, package=byte_lm) as server:
        plan = LoadPlan(url=server.url, seed=1, phases=(), requests=str(file), slo_s=5.0)
        base, out = Base(rate=20.0), tmp_path / "run"
        report = measure(plan, out, profile="quick", shape=((1, 1),), base=base)
    counts = report.reconciliation
    assert counts.unexplained == 0
    assert counts.server_codes[504] == counts.own_codes[504] == report.phases[0].counts["timeout"]
