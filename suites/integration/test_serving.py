"""What the server answers is what the trained model says."""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from forge_harness.load.metrics import direct
from forge_harness.load.records import Fate
from forge_harness.load.target import started
from forge_harness.load.traffic import judge, read_requests

AT_ONCE = 8
AGAIN = (Fate.SHED, Fate.TIMEOUT)
PATIENCE_S, PAUSE_S = 20.0, 0.5
"""A server on a busy machine sheds: that request is sent again, for so long over all requests of a
server. How much it sheds is the load checks' matter."""


@pytest.mark.forge_check("integration.served_equals_trained")
def test_served_equals_trained(subject, evidence, tmp_path):
    """Every answer through the server is the trained model's, alone, together, and streamed.

    Oracle: the answers in the request files, computed by the trained model without server, cache,
    batch or packing. Each request is sent alone, then all again with others at once, whose batch it
    shares; and once more as a stream where the server has one. Of each further server of the
    subject too: sampled and long completions, classes.
    """
    spec = subject.server(tmp_path)
    specs = (spec, *spec.others)
    files = [read_requests(each.requests) for each in specs]
    requests = [request for file in files for request in file]
    checked = sum(bool(request.expect) for request in requests)
    evidence.equal(
        "with_answers", checked, expected=len(requests), unit="requests", reason="that can be wrong"
    )
    evidence.at_least("requests", len(requests), limit=10, unit="requests", reason="of any kind")
    evidence.record("kinds", len(_kinds(requests)), reason=", ".join(_kinds(requests)))
    verdicts = {"alone": [], "together": [], "streamed": []}
    for each, file in zip(specs, files, strict=True):
        for name, found in _answers(each, file).items():
            verdicts[name] += found
    for name, found in verdicts.items():
        wrong = [verdict for verdict in found if verdict]
        evidence.equal(
            f"wrong_{name}",
            len(wrong),
            expected=0,
            unit="answers",
            reason=wrong[0] if wrong else f"all {len(found)} are the trained model's",
        )


def _kinds(requests):
    """What a reader may conclude from: routes, and whether anything is drawn."""
    return sorted(
        {
            r.path + (", sampled" if json.loads(r.body or "{}").get("temperature") else "")
            for r in requests
        }
    )


def _answers(spec, requests):
    with started(spec.command) as target:
        until = time.monotonic() + PATIENCE_S

        def asked(numbered):
            return _asked(target.url, *numbered, until)

        alone = [asked(each) for each in enumerate(requests)]
        numbered = list(enumerate(requests * 3))
        together = []
        for begin in range(0, len(numbered), AT_ONCE):
            wave = numbered[begin : begin + AT_ONCE]
            verdicts = _in_one_go(target.url, wave)
            together += [
                asked(each) if verdict.fate in AGAIN else _what_is_wrong(verdict)
                for each, verdict in zip(wave, verdicts, strict=True)
            ]
        streams = [_as_stream(request) for request in requests if request.path.endswith("tions")]
        streamed = [asked(each) for each in enumerate(streams)]
    return {"alone": alone, "together": together, "streamed": streamed}


def _as_stream(request):
    body = json.dumps({**json.loads(request.body), "stream": True}).encode()
    return type(request)(path=request.path, body=body, streamed=True, expect=request.expect)


def _asked(url, number, request, until):
    """Returns what is wrong with an answer; empty when nothing is."""
    verdict = _once(url, number, request)
    while verdict.fate in AGAIN and time.monotonic() < until:
        time.sleep(PAUSE_S)
        verdict = _once(url, number, request)
    return _what_is_wrong(verdict)


def _what_is_wrong(verdict):
    return "" if verdict.fate is Fate.OK else verdict.detail or str(verdict.fate)


def _in_one_go(url, wave):
    """Sends every request before it reads an answer: threads would send them one by one."""
    connections = []
    for _ in wave:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.connect()
        connections.append(connection)
    for connection, (number, request) in zip(connections, wave, strict=True):
        connection.request(request.method, request.path, request.body, _headers(number))
    verdicts = []
    for connection, (number, request) in zip(connections, wave, strict=True):
        with contextlib.closing(connection):
            answer = connection.getresponse()
            verdicts.append(_judged(number, request, answer.status, answer.headers, answer.read()))
    return verdicts


def _once(url, number, request):
    asked = urllib.request.Request(
        url + request.path, data=request.body, headers=_headers(number), method=request.method
    )
    try:
        with direct().open(asked, timeout=60) as answer:
            status, body, told = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        status, body, told = error.code, error.read(), error.headers
    return _judged(number, request, status, told, body)


def _headers(number):
    return {"Content-Type": "application/json", "X-Request-Id": f"r{number}"}


def _judged(number, request, status, told, body):
    names = {name.lower(): value for name, value in told.items()}
    return judge(request, status=status, headers=names, body=body, sent_id=f"r{number}")
