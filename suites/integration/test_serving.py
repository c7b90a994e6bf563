"""What the server answers is what the trained model says."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from forge_harness.load.records import Fate
from forge_harness.load.target import started
from forge_harness.load.traffic import judge, read_requests

AT_ONCE = 8


@pytest.mark.forge_check("integration.served_equals_trained")
def test_served_equals_trained(subject, evidence, tmp_path):
    """Every answer through the server is the trained model's, alone, together, and streamed.

    Oracle: the answers in the request file, computed by the trained model without server, cache,
    batch or packing. Each request is sent alone, then all again with others at once, whose batch it
    shares; and once more as a stream where the server has one.
    """
    spec = subject.server(tmp_path)
    requests = read_requests(spec.requests)
    checked = sum(bool(request.expect) for request in requests)
    evidence.equal(
        "with_answers", checked, expected=len(requests), unit="requests", reason="that can be wrong"
    )
    evidence.at_least("requests", len(requests), limit=10, unit="requests", reason="of any kind")
    with started(spec.command) as target:
        alone = [_asked(target.url, request, n) for n, request in enumerate(requests)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(_asked, target.url, r, n) for n, r in enumerate(requests * 3)]
            together = [job.result() for job in jobs]
        streams = [_as_stream(request) for request in requests if request.path.endswith("tions")]
        streamed = [_asked(target.url, request, n) for n, request in enumerate(streams)]
    for name, verdicts in (("alone", alone), ("together", together), ("streamed", streamed)):
        wrong = [verdict for verdict in verdicts if verdict]
        evidence.equal(
            f"wrong_{name}",
            len(wrong),
            expected=0,
            unit="answers",
            reason=wrong[0] if wrong else f"all {len(verdicts)} are the trained model's",
        )


def _as_stream(request):
    body = json.dumps({**json.loads(request.body), "stream": True}).encode()
    return type(request)(path=request.path, body=body, streamed=True, expect=request.expect)


def _asked(url, request, number):
    """Returns what is wrong with an answer; empty when nothing is."""
    headers = {"Content-Type": "application/json", "X-Request-Id": f"r{number}"}
    asked = urllib.request.Request(
        url + request.path, data=request.body, headers=headers, method=request.method
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            status, body, told = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        status, body, told = error.code, error.read(), error.headers
    names = {name.lower(): value for name, value in told.items()}
    verdict = judge(request, status=status, headers=names, body=body, sent_id=f"r{number}")
    return "" if verdict.fate is Fate.OK else verdict.detail or str(verdict.fate)
