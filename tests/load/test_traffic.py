"""Answers: right ones pass, and every way to be wrong has its class."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import LoadError
from forge_harness.load.plan import read_plan
from forge_harness.load.records import Fate
from forge_harness.load.traffic import Request, judge, read_requests, requests_of, seeded_digits

from . import support

LABELS = Request(path="/v1/predict", expect={"labels": [3]})
STREAM = Request(path="/v1/completions", streamed=True, expect={"tokens": [5, 6, 7]})


def judged(request, body, status=200, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(request, status=status, headers=named, body=content, sent_id="r1")


def stream(tokens, *, promised=None, done=True, end=True):
    events = [{"text": chr(97 + t), "token": t} for t in tokens]
    if end:
        count = len(tokens) if promised is None else promised
        events.append({"finish_reason": "length", "usage": {"completion_tokens": count}})
    body = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    return body + (b"data: [DONE]\n\n" if done else b"")


def test_a_right_answer_is_ok():
    found = judged(LABELS, {"labels": [3], "request_id": "r1"}, x_request_id="r1")
    assert (found.fate, found.detail) == (Fate.OK, "")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"labels": [4]}, "wrong answer (labels)"),
        ({"label": [3]}, "wrong answer (labels)"),
        ({"labels": [3, 3]}, "wrong answer (labels)"),
        ([3], "no JSON object"),
        (b"<html>", "no JSON"),
        (b"", "no JSON"),
        ({"labels": [3], "request_id": "r2"}, "another request (request_id)"),
        (b'{"labels": [3], "logits": [NaN, -Infinity]}', "no JSON"),
        (b'{"labels": [4], "labels": [3]}', "no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "another form"),
        ({"choices": ["x"]}, "another form"),
        ({"choices": [3]}, "another form"),
        ({"choices": [{"text": "\ud800"}]}, "another form"),
        (b'\xff\xfe{"labels": [3]}', "no JSON"),
    ],
)
def test_a_wrong_answer_is_an_error(body, said):
    found = judged(LABELS, body)
    assert found.fate is Fate.ERROR
    assert said in found.detail


@pytest.mark.parametrize(
    ("expect", "answer"),
    [
        ({"labels": [1]}, {"labels": [True]}),
        ({"tokens": [0]}, {"choices": [{"tokens": [False]}]}),
        ({"json": {"ok": True}}, {"ok": 1}),
        ({"json": {"rows": [{"n": 0}]}}, {"rows": [{"n": False}]}),
    ],
)
def test_true_is_no_number_and_a_number_may_be_written_as_a_fraction(expect, answer):
    request = Request(path="/", expect=expect)
    assert judged(request, answer).detail.startswith("wrong answer")
    assert judged(Request(path="/", expect={"labels": [1]}), {"labels": [1.0]}).fate is Fate.OK


def test_an_answer_to_head_has_no_body():
    """It is whole without one, and is right for nothing that is expected of a body."""
    head = Request(path="/healthz", method="HEAD")
    assert judged(head, b"", x_request_id="r1").fate is Fate.OK
    assert judged(head, b"", x_request_id="r2").fate is Fate.ERROR
    assert judged(head, b"", 404).detail == "status 404"
    expecting = Request(path="/healthz", method="HEAD", expect={"labels": [1]})
    assert judged(expecting, b"").detail == "answer is no JSON object"


def test_an_answer_to_somebody_else_is_an_error():
    found = judged(LABELS, {"labels": [3]}, x_request_id="r2")
    assert (found.fate, found.detail) == (Fate.ERROR, "answer to another request (X-Request-Id)")


@pytest.mark.parametrize(
    ("status", "headers", "fate"),
    [
        (503, {"retry_after": "1"}, Fate.SHED),
        (429, {"retry_after": "1"}, Fate.SHED),
        (503, {}, Fate.ERROR),
        (429, {}, Fate.ERROR),
        (504, {}, Fate.TIMEOUT),
        (500, {"retry_after": "1"}, Fate.ERROR),
        (404, {}, Fate.ERROR),
        (302, {}, Fate.ERROR),
        (204, {}, Fate.ERROR),
    ],
)
def test_statuses_have_their_class(status, headers, fate):
    assert judged(LABELS, b"", status, **headers).fate is fate


@given(st.lists(st.integers(0, 25), max_size=20))
def test_a_whole_stream_is_the_answer_it_would_have_been(tokens):
    text = "".join(chr(97 + t) for t in tokens)
    expect = {"tokens": tokens, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    request = Request(path="/v1/completions", streamed=True, expect=expect)
    assert judged(request, stream(tokens)).fate is Fate.OK
    wrong = Request(path="/v1/completions", streamed=True, expect={"tokens": [*tokens, 1]})
    assert judged(wrong, stream(tokens)).fate is Fate.ERROR


@given(st.lists(st.integers(0, 25), min_size=1, max_size=8), st.data())
def test_a_stream_cut_anywhere_is_never_ok(tokens, data):
    body = stream(tokens)
    cut = data.draw(st.integers(0, len(body) - 1))
    found = judged(Request(path="/", streamed=True), body[:cut])
    assert found.fate is Fate.ERROR


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (stream([5, 6, 7], end=False), "no terminal event"),
        (stream([5, 6, 7], done=False), "no [DONE]"),
        (stream([5, 6], promised=3), "2 of 3 tokens"),
        (stream([5, 6, 8]), "wrong answer (tokens)"),
        (b"data: {\n\ndata: [DONE]\n\n", "no JSON"),
    ],
)
def test_streams_are_wrong_in_these_ways(body, said):
    found = judged(STREAM, body)
    assert found.fate is Fate.ERROR
    assert said in found.detail


@pytest.mark.parametrize(
    ("error", "fate", "status", "said"),
    [
        ({"status": 504, "title": "The deadline passed"}, Fate.TIMEOUT, 504, "status 504"),
        ({"status": 503}, Fate.ERROR, 503, "status 503"),
        ({"message": "overloaded"}, Fate.ERROR, None, "an error"),
        ({"status": "504"}, Fate.ERROR, None, "an error"),
        ({"status": 200}, Fate.ERROR, None, "an error"),
    ],
)
def test_a_stream_that_ends_with_an_error_is_what_the_error_says(error, fate, status, said):
    body = stream([5, 6], end=False, done=False)
    body += b"data: %s\n\ndata: [DONE]\n\n" % json.dumps({"error": error}).encode()
    found = judged(STREAM, body)
    assert (found.fate, found.status) == (fate, status)
    assert found.detail == f"stream ended with {said}"


END = {"finish_reason": "length", "usage": {}}


@pytest.mark.parametrize(
    "events",
    [
        [{"token": 1, "text": "a"}, {"finish_reason": "length", "usage": None}],
        [{"token": 1, "text": None}, END],
        [5, END],
        [None, END],
        [END, 5],
        [{"token": 1}, {"finish_reason": "length", "usage": [1]}],
    ],
)
def test_events_of_another_form_are_an_error_and_end_nothing(events):
    """What raised here ended the request without a record, and the run was INVALID."""
    body = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    for request in (STREAM, Request(path="/", streamed=True)):
        assert judged(request, body + b"data: [DONE]\n\n").fate is Fate.ERROR


def test_lines_of_a_stream_end_as_the_standard_says_and_nowhere_else():
    whole = stream([5, 6, 7])
    for end in (b"\r\n", b"\r"):
        assert judged(STREAM, whole.replace(b"\n", end)).fate is Fate.OK
        assert "in the middle" in judged(STREAM, whole.replace(b"\n", end)[: -len(end)]).detail
    text = "a\u2028b\x85"
    parts = [{"token": 1, "text": text}, END]
    body = "".join(f"data: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    request = Request(path="/", streamed=True, expect={"text_sha256": digest})
    assert judged(request, body.encode() + b"data: [DONE]\n\n").fate is Fate.OK


def test_a_part_of_the_answer_may_be_expected():
    request = Request(path="/", expect={"json": {"usage": {"prompt_tokens": 3}}})
    assert judged(request, {"usage": {"prompt_tokens": 3, "x": 1}, "y": 2}).fate is Fate.OK
    assert judged(request, {"usage": {"prompt_tokens": 4}}).detail == "wrong answer (json)"
    assert judged(request, {"usage": 3}).fate is Fate.ERROR


def test_a_request_file_is_read(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"path": "/v1/predict", "body": {"inputs": [[1]]}, "expect": {"labels": [1]}}\n\n'
        '{"path": "/v1/completions", "body": {"prompt": "a", "stream": true}}\n'
        '{"path": "/healthz", "method": "get"}\n',
        encoding="utf-8",
    )
    first, second, third = read_requests(file)
    assert (first.method, json.loads(first.body)) == ("POST", {"inputs": [[1]]})
    assert (first.streamed, second.streamed) == (False, True)
    assert (third.method, third.body) == ("GET", b"")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("{", "line 1 is no JSON"),
        ('{"path": "/a"}\n{"path": "b"}', "line 2 is no request"),
        ("[]", "line 1 is no request"),
        ('{"path": 3}', "line 1 is no request"),
        ('{"path": "/a\\r\\nX: y"}', "line 1 is no request"),
        ('{"path": "/a", "expects": {}}', "unknown ['expects']"),
        ('{"path": "/a", "expect": {"label": 1}}', "unknown ['label']"),
        ('{"path": "/a", "expect": 3}', "expect is no object"),
        ('{"path": "/a", "body": NaN}', "line 1 is no JSON: NaN"),
        ('{"path": "/a", "path": "/b"}', "line 1 is no JSON: key 'path' is there twice"),
        ('{"path": "/a", "body": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 nests too deep"),
        ('{"path": "/a", "method": "GET / HTTP/1.1\\r\\nX: y"}', "is none; expected GET"),
        ('{"path": "/a", "method": 3}', "method '3' is none"),
        ('{"path": "/%6detrics?x"}', "/metrics is read by the load itself"),
    ],
)
def test_a_bad_request_file_is_said_with_its_line(tmp_path, text, said):
    file = tmp_path / "requests.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LoadError) as caught:
        read_requests(file)
    assert said in str(caught.value)


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    file = tmp_path / "requests.jsonl"
    lines = ['{"path": "/a", "body": "x\u2028y\x85"}', '{"path": "/b"}']
    file.write_bytes("\r\n".join(lines).encode())
    first, second = read_requests(file)
    assert (json.loads(first.body), second.path) == ("x\u2028y\x85", "/b")


def test_a_missing_request_file_is_said(tmp_path):
    with pytest.raises(LoadError, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl")


def test_a_plan_sends_its_copy_and_nothing_else(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"path": "/a"}\n')
    run = tmp_path / "run"
    plan = read_plan(support.plan_of(requests=str(file)).write(run))
    file.write_text('{"path": "/b"}\n')
    assert [request.path for request in requests_of(plan, run)] == ["/a"]
    (run / "requests.jsonl").write_text('{"path": "/b"}\n')
    with pytest.raises(LoadError, match=r"requests\.jsonl is not what was sent: its SHA-256"):
        requests_of(plan, run)
    (run / "requests.jsonl").unlink()
    with pytest.raises(LoadError, match=r"requests\.jsonl cannot be read"):
        requests_of(plan, run)


def test_a_plan_that_does_not_say_which_requests_it_sent_is_refused(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"path": "/a"}\n')
    with pytest.raises(LoadError, match=r"without a digest.*; run the load again"):
        requests_of(support.plan_of(requests=str(file)), tmp_path)
    assert requests_of(support.plan_of(), tmp_path) == seeded_digits(1)


def test_digits_are_made_from_the_seed():
    assert seeded_digits(1) == seeded_digits(1) != seeded_digits(2)
    inputs = [json.loads(request.body)["inputs"][0] for request in seeded_digits(3)]
    assert {len(row) for row in inputs} == {64}
    assert all(0 <= value <= 16 for row in inputs for value in row)


def test_the_text_of_a_stream_ends_with_its_terminal_event():
    """A character that was cut off has no token left to come with."""
    digest = hashlib.sha256("ab\ufffd".encode()).hexdigest()
    request = Request(path="/", streamed=True, expect={"text_sha256": digest})
    body = stream([0, 1]).replace(
        b'"finish_reason"', b'"text": ' + json.dumps("\ufffd").encode() + b', "finish_reason"'
    )
    assert judged(request, body).fate is Fate.OK
    assert judged(request, stream([0, 1])).fate is Fate.ERROR
