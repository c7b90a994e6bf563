"""The page of a load run: self-contained, the same bytes, hostile text as text, both schemes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from forge_harness.load.analysis import analyse
from forge_harness.load.peak import Peak, Probe
from forge_harness.report.load import load_page, load_section, load_view, write_load_report

from ..load import support
from .test_browser import CONTRAST, browser  # noqa: F401 - a fixture
from .test_html import Page

PLAN = support.plan_of(shape=((1, 4), (23, 1), (1, 4)))
PROBES = tuple(
    Probe(rate=r, offered=9, good=9, goodput=r, p95_s=p, valid=r < 50)
    for r, p in ((20.0, 0.01), (40.0, math.inf), (80.0, None))
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    records = support.served(PLAN)
    overload = [i for i, r in enumerate(records) if 4 <= r.intended < 5]
    for i in overload[::2]:
        records[i] = support.shed(records[i])
    records[overload[1]] = replace(
        support.silent(records[overload[1]]), detail="<script>alert(1)</script>"
    )
    made = analyse(support.write_run(tmp_path_factory.mktemp("run"), PLAN, records))
    return replace(made, peak=Peak(rate=40.0, above=80.0, goodput=40.0, bound="server",
                                   probes=PROBES))  # fmt: skip


@pytest.fixture(scope="module")
def view(report):
    return load_view(report)


def test_the_page_is_whole_and_loads_nothing(view):
    page = Page(load_page(view))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    hrefs = {a[key] for _, a in page.elements for key in ("href", "xlink:href") if a.get(key)}
    assert {href[1:] for href in hrefs - {"data:,"}} <= set(ids)
    assert all(href.startswith("#") for href in hrefs - {"data:,"})
    assert not {"script", "iframe", "img", "object", "form"} & {tag for tag, _ in page.elements}
    assert not any("style" in attributes for _, attributes in page.elements)


def test_the_page_says_what_the_report_says(view, report):
    text = Page(load_page(view)).text
    assert f"{report.reconciliation.scheduled} offered = " in text
    for gate in report.gates:
        assert gate.name in text
    assert "40.0 requests/s (80/s was not served; 3 probes)" in text
    assert "too few samples for that percentile" in text
    assert text.count("no answer") >= 1


def test_what_servers_say_is_shown_as_text(view):
    page = load_page(view)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_nothing_of_an_invalid_run_looks_measured(report):
    first, *others = report.phases
    void = replace(first, problems=("the generator used 99 % of a core",))
    page = load_page(load_view(replace(report, phases=(void, *others))))
    assert page.count('<tr class="void">') == 1
    assert ">1x void</text>" in page
    gates = page.partition("What the run is held to")[2].partition("</table>")[0]
    assert gates.count(">void</span>") == len(report.gates)
    assert "badge pass" not in gates
    assert "void" not in load_page(load_view(report)).partition("</style>")[2]


def test_the_same_run_gives_the_same_bytes(report, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_load_report(tmp_path / name, report)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["load-latency.svg", "load-refused.svg", "load-throughput.svg", "load.html"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_plots_alone_are_whole_pictures(report, tmp_path):
    for path in write_load_report(tmp_path, report)[1:]:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        text = path.read_text(encoding="utf-8")
        assert "var(--series-1)" in text
        assert "prefers-color-scheme:dark" in text
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", text)


def test_two_runs_on_a_page_do_not_share_ids(report):
    sections = "".join(load_section(load_view(report, prefix)) for prefix in ("first", "second"))
    ids = re.findall(r'\bid="([^"]+)"', sections)
    assert len(ids) == len(set(ids))


def test_a_run_without_windows_has_no_plots(report):
    assert load_view(replace(report, windows=())).plots == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_complaint(browser, view, tmp_path, scheme, width):  # noqa: F811
    file = tmp_path / "load.html"
    file.write_text(load_page(view), encoding="utf-8")
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True
    )
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(file.as_uri())
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    assert page.evaluate(CONTRAST) == []
    assert page.locator("svg.plot").count() == 3
    context.close()
    assert said == []
