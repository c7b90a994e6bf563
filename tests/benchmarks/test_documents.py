"""Every median and ratio of a benchmark's document can be computed again from its raw times."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from forge_harness.benchmarks import (
    conversion,
    language_model,
    products,
    report,
    storage,
    timing,
    training,
)
from forge_harness.benchmarks.timing import Timed
from forge_harness.errors import StateError
from forge_harness.kernels import backends
from forge_harness.state import Store

ROUNDS = 9
DISTURBED = (2, 5)
"""Rounds in which another process took the core; they count in no median and no ratio."""


@pytest.fixture(autouse=True)
def disturbances(monkeypatch):
    """Makes some rounds slow and disturbed, whatever really happened."""
    real = timing.interleave

    def disturbing(candidates, *, rounds, batch=0.0, rest=0.0):
        timed = real(candidates, rounds=rounds, batch=0.0, rest=rest)
        for each in timed.values():
            each.disturbed = [index in DISTURBED for index in range(rounds)]
            for index in DISTURBED:
                each.seconds[index] *= 1000
        return timed

    for module in (products, language_model, training, conversion, storage):
        monkeypatch.setattr(module, "interleave", disturbing)


def clean(entry, name, samples="samples"):
    pairs = zip(entry[samples][name], entry["disturbed"][name], strict=True)
    return [seconds for seconds, disturbed in pairs if not disturbed]


def ratio(slower, faster):
    """The middle of the paired ratios, as the tables show it."""
    timed = [Timed("", 1, values, [False] * len(values)) for values in (faster, slower)]
    return timing.speedup(*timed).estimate


def test_products(monkeypatch):
    case = products.Case(tokens=2, rows=100, columns=50, cold=False, threads=1)
    row = products.measure(case, rounds=ROUNDS)
    document = json.loads(json.dumps(report.document([row], started=datetime.now(UTC))))
    (entry,) = document["rows"]
    times = {name: clean(entry, name, "seconds_a_call") for name in entry["seconds_a_call"]}
    for name, seconds in times.items():
        assert entry["microseconds"][name] == pytest.approx(1e6 * statistics.median(seconds))
    for peer, found in entry["times_faster_than"].items():
        assert found["estimate"] == pytest.approx(ratio(times[peer], times["ours"]))
    padded = 2 * 128 * 64
    floors = {"read": statistics.median(times["read probe"])}
    if entry["probe_multiplications"]:
        each = statistics.median(times["multiply probe"]) / entry["probe_multiplications"]
        floors["multiply"] = each * padded
    share = floors[entry["bound"]] / statistics.median(times["ours"])
    assert max(floors.values()) == floors[entry["bound"]]
    assert entry["roofline_share"] in (None, pytest.approx(share))


def test_language_model():
    found = language_model.measure(width=64, layers=1, prompt=4, threads=(1,), rounds=ROUNDS)
    for phase in json.loads(json.dumps(asdict(found)))["phases"]:
        tokens = 4 if phase["name"] == "prefill" else 1
        for side, rate in phase["tokens_per_second"].items():
            assert rate == pytest.approx(tokens / statistics.median(clean(phase, side)))
        over = ratio(clean(phase, "dense-bf16"), clean(phase, "packed"))
        assert phase["over_bf16"]["packed"][0] == pytest.approx(over)


def test_training():
    found = training.measure(width=64, layers=1, batch=2, threads=(1,), rounds=ROUNDS)
    (steps,) = json.loads(json.dumps(asdict(found)))["steps"]
    for name, milliseconds in steps["milliseconds"].items():
        assert milliseconds == pytest.approx(1e3 * statistics.median(clean(steps, name)))
    assert set(steps["over_full"]) == {arm.name for arm in training.ARMS} - {"full"}
    for name, found in steps["over_full"].items():
        assert found[0] == pytest.approx(ratio(clean(steps, name), clean(steps, "full")))


def test_conversions(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHAPES", ((256, 512),))
    rows = list(conversion.measured(tmp_path, targets=("gguf-tq1_0",), blocks=1, rounds=ROUNDS))
    for row in json.loads(json.dumps([asdict(row) for row in rows])):
        ours, copy = clean(row, "convert"), clean(row, "copy")
        assert row["seconds"] == pytest.approx(statistics.median(ours))
        assert row["copy_seconds"] == pytest.approx(statistics.median(copy))
        assert row["times"][0] == pytest.approx(ratio(ours, copy))


def test_storage(tmp_path):
    found = storage.measure(tmp_path, blob_bytes=1 << 20, states=10, rounds=ROUNDS)
    for row in json.loads(json.dumps(asdict(found)))["rows"]:
        amounts = row["amounts"]
        ours, theirs = clean(row, "ours"), clean(row, "baseline")
        assert row["rate"] == pytest.approx(amounts["ours"] / statistics.median(ours))
        assert row["baseline_rate"] == pytest.approx(
            amounts["baseline"] / statistics.median(theirs)
        )
        scaled = ratio(ours, theirs) * amounts["baseline"] / amounts["ours"]
        assert row["times"][0] == pytest.approx(scaled)


@pytest.fixture
def all_disturbed(monkeypatch):
    """A machine on which another process took the core in every round."""
    monkeypatch.setattr(sys.modules[__name__], "DISTURBED", range(ROUNDS))


CASE = products.Case(tokens=2, rows=100, columns=50, cold=False, threads=1)
BENCHMARKS = {
    "kernels": lambda place: report.table([products.measure(CASE, rounds=ROUNDS)]),
    "lm": lambda place: report.language_model_table(
        language_model.measure(width=64, layers=1, prompt=4, threads=(1,), rounds=ROUNDS)
    ),
    "train": lambda place: report.training_table(
        training.measure(width=64, layers=1, batch=2, threads=(1,), rounds=ROUNDS)
    ),
    "convert": lambda place: report.conversion_table(
        list(conversion.measured(place, targets=("gguf-tq1_0",), blocks=1, rounds=ROUNDS))
    ),
    "store": lambda place: report.storage_table(
        storage.measure(place, blob_bytes=1 << 20, states=10, rounds=ROUNDS)
    ),
}
MARKED = {"kernels": 6, "lm": 2 * 5, "train": 4 * 2 + 3, "convert": 2 * 3, "store": 5 * 3}
"""Figures in the rows of each: for products time, rate, ceiling and three peers."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_figures_of_disturbed_rounds_are_marked(name, tmp_path, monkeypatch, request):
    monkeypatch.setattr(conversion, "SHAPES", ((256, 512),))
    quiet = BENCHMARKS[name](tmp_path)
    assert "~" not in quiet
    request.getfixturevalue("all_disturbed")
    *lines, meaning = re.split("\n~: ", BENCHMARKS[name](tmp_path))
    assert lines[0].count("~") == MARKED[name]
    assert "not measured, run it again on a quiet machine, with no more threads" in meaning


def test_documents_say_what_is_void(all_disturbed):
    row = products.measure(CASE, rounds=ROUNDS)
    (entry,) = report.document([row], started=datetime.now(UTC))["rows"]
    ratios = [f"{peer} / ours" for peer in products.PEERS]
    assert entry["void"] == [*entry["seconds_a_call"], *ratios]
    found = training.measure(width=64, layers=1, batch=2, threads=(1,), rounds=ROUNDS)
    (steps,) = asdict(found)["steps"]
    assert steps["void"] == [*steps["samples"], *(f"{arm} / full" for arm in steps["over_full"])]


@pytest.mark.parametrize("path", ["scalar", "mmx"])
def test_documents_say_which_instruction_set_multiplied(path, monkeypatch):
    """Not all of them have a row that does. One that does not run is none, and no error here."""
    monkeypatch.setattr(backends, "_default_path", None)
    monkeypatch.setenv("FORGE_KERNELS_PATH", path)
    environment = report.heading("lm", datetime.now(UTC))["environment"]
    assert environment["path"] == (path if path in environment["paths"] else None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_writer_that_fails_is_said_once_and_by_its_parent(tmp_path, monkeypatch):
    """The child of fork went on as a second benchmark: it removed the files and said its own."""

    def refuse(self, states, **options):
        raise StateError("Nothing was committed: no space")

    monkeypatch.setattr(Store, "commit", refuse)
    process = os.getpid()
    with pytest.raises(StateError, match=r"10 states ended with 1: .* no space") as caught:
        storage._opening(tmp_path / "store", 10, rounds=6)
    assert os.getpid() == process
    assert caught.value.__cause__ is None
