"""Rows of the kernel benchmark: what is timed is the product, and the arithmetic is right."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from forge_harness import kernels
from forge_harness.benchmarks import products, report
from forge_harness.benchmarks.products import Case
from forge_harness.benchmarks.timing import Timed
from forge_harness.errors import BackendUnavailableError

SMALL = Case(tokens=1, rows=128, columns=64, cold=False, threads=1)


@pytest.fixture(scope="module")
def row():
    return products.measure(SMALL, rounds=6)


def test_a_row_holds_every_candidate_and_both_ceilings(row):
    assert set(row.microseconds) == {"ours", "multiply probe", "read probe", *products.PEERS}
    assert set(row.over) == set(products.PEERS)
    assert row.packed_bytes == 2 * 4 * 256
    assert row.gigaops == pytest.approx(2 * 128 * 64 / row.microseconds["ours"] / 1e3)
    assert row.roofline > 0
    assert row.bound in ("multiply", "read")
    assert all(len(samples) == 6 for samples in row.samples.values())


def test_without_peers_only_ceilings_are_timed():
    row = products.measure(SMALL, peers=False, rounds=6, path="scalar")
    assert set(row.microseconds) == {"ours", "read probe"}
    assert row.path == "scalar"
    assert row.over == {}


def test_cold_calls_rotate_and_still_compute(monkeypatch):
    monkeypatch.setattr(products, "COLD_BYTES", 5000)
    seen = []
    real = kernels.ternary_linear

    def spy(x, packed, **options):
        seen.append(packed.data.data_ptr())
        return real(x, packed, **options)

    monkeypatch.setattr(kernels, "ternary_linear", spy)
    case = Case(1, 128, 64, cold=True, threads=1)
    call = products.packed_product_call(case, kernels.cpu_path())
    for _ in range(6):
        call()
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]


def test_a_cold_case_never_asks_for_more_copies_than_can_be_made():
    for rows, columns in ((443, 444), (1, 196_608), (2560, 2560)):
        assert products.can_be_cold(rows, columns)
        case = Case(1, rows, columns, cold=True, threads=1)
        assert products._copies(case, rows * columns // 4) <= products.MOST_COPIES
    with pytest.raises(ValueError, match=r"442x442 cannot be timed cold.*time it hot"):
        products.measure(Case(1, 442, 442, cold=True, threads=1))


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    products.measure(Case(1, 64, 16, False, threads=2), peers=False, rounds=6)
    assert torch.get_num_threads() == before


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(BackendUnavailableError, match="'mmx'"):
        products.measure(SMALL, path="mmx")


def test_table_document_and_plot_say_the_same(row):
    text = report.table([row])
    assert "M=1 128x64 hot 1T" in text
    assert f"{row.over['torch bf16'][0]:.1f}" in text
    document = report.document([row], started=datetime.now(UTC))
    assert json.loads(json.dumps(document)) == document
    entry = document["rows"][0]
    assert entry["times_faster_than"]["torch bf16"]["estimate"] == row.over["torch bf16"][0]
    assert document["environment"]["native"] == kernels.native_version()
    svg = ET.fromstring(report.plot([row]))
    assert svg.tag.endswith("svg")
    assert "M=1 128x64 hot 1T" in report.plot([row])


def test_the_plot_shows_every_product_and_peer_and_what_is_void(row):
    quiet = replace(row, void=[], roofline=0.5, over={**row.over, products.I2S: (2.0, 1.0, 3.0)})
    svg = report.plot([quiet, quiet])
    assert svg.count("<!-- M=1 128x64 hot 1T") == 2
    assert f"<!-- {products.I2S} -->" in svg
    assert not any(mark in svg for mark in ("<pattern", "hollow", "<!-- ? -->"))
    filled = svg.count('style="fill: #1f77b4')
    ratio = replace(quiet, void=["torch fp32 / ours"])
    hollow = report.plot([ratio, quiet])
    assert "hollow" in hollow
    assert hollow.count('style="fill: #1f77b4') < filled
    for name in ("ours", f"{row.bound} probe"):
        assert "<pattern" in report.plot([replace(quiet, void=[name])])
    assert "<!-- ? -->" in report.plot([replace(quiet, roofline=None)])


def timed(name, seconds):
    return Timed(name, 1, [seconds] * 6, [False] * 6)


@pytest.mark.parametrize(("probe", "share"), [(0.9, 0.9), (1.1, 1.1), (1.2, None)])
def test_more_than_the_ceiling_is_no_share(probe, share):
    times = {"ours": timed("ours", 1.0), "read probe": timed("read probe", probe)}
    row = products._row(SMALL, "scalar", times, 2048)
    assert row.roofline == share
    text = report.table([row])
    assert ("?: more than 110 % of the ceiling" in text) is (share is None)
    assert report.document([row], started=datetime.now(UTC))["rows"][0]["roofline_share"] == share
    assert report.plot([row])
