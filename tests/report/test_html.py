"""The HTML report: links resolve, nothing external, hostile text stays text, size, same bytes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from forge_harness.report import build_report, html, render_html
from forge_harness.report.write import render_json
from forge_harness.types import Outcome

from . import support

KINDS = tuple(support.RECORDS)
VOID = {"meta", "link", "br", "input"}
SVG_LEAVES = {"path", "rect", "circle", "use", "polyline"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; raises on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(params=KINDS)
def page(request, page_of):
    return Page(page_of(request.param))


def test_every_link_leads_somewhere_in_the_page(page):
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    hrefs = {a[key] for _, a in page.elements for key in ("href", "xlink:href") if a.get(key)}
    assert len(hrefs) > 100
    outside = {href for href in hrefs if not href.startswith("#")} - {"data:,"}
    assert outside == set()
    assert {href[1:] for href in hrefs if href.startswith("#")} <= set(ids)
    referenced = " ".join(a.get("aria-labelledby") or "" for _, a in page.elements).split()
    assert set(referenced) <= set(ids)


def test_nothing_is_loaded_or_run(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "img", "object", "embed", "form", "base"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in {"style", "src"} for name in attributes)
    styles = page.all("style")
    assert len(styles) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_of_the_page_names_the_one_style_sheet(kind, page_of):
    text = page_of(kind)
    css = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = next(m for m in Page(text).all("meta") if m.get("http-equiv"))["content"]
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "unsafe" not in policy
    assert "url(" not in css
    assert "@import" not in css


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_small_and_clean(kind, page_of):
    data = page_of(kind).encode()
    assert len(data) < html.MAX_BYTES
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", data)
    assert "\u202e" not in data.decode()


def test_hostile_text_is_shown_as_text(page_of):
    page = Page(page_of("hostile"))
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}]]>&amp;" in page.text
    assert "\\u202e" in page.text


def test_only_stored_files_are_linked():
    rows = [
        support.evidence("", "stored", "sha256:x", artifact=support.ARTIFACT),
        support.evidence("", "forged", "sha256:y", artifact="javascript:alert(1)"),
        support.evidence("", "outside", "sha256:z", artifact="evidence/sha256/../../etc/passwd"),
    ]
    items = support.items_of_all()
    items[0] = support.item(items[0].check, rows=rows)
    report = build_report(support.record(items), support.POLICY)
    links = {a["href"] for a in Page(render_html(report)).all("a") if a["href"][0] != "#"}
    assert links == {support.ARTIFACT}
    elsewhere = Page(render_html(report, has_artifacts=False))
    assert all(a["href"].startswith("#") for a in elsewhere.all("a"))
    assert support.ARTIFACT in elsewhere.text


def test_the_order_is_that_of_the_reader(page_of):
    text = page_of("fail")
    places = [
        text.index(f'id="{name}"')
        for name in (
            "verdict",
            "reasons",
            "changes",
            "suites",
            "components",
            "quality",
            "load",
            "checks",
            "waivers",
            "specification",
            "provenance",
        )
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("kind", "word", "score"),
    [
        ("pass", "PASS", "Integration score 100 (at most 100), 100 % measured"),
        ("fail", "FAIL", "Integration score 49 (at most 49), 98 % measured"),
        ("incomplete", "INCOMPLETE", "Integration score 79 (at most 79), 90 % measured"),
    ],
)
def test_the_headline(kind, word, score, page_of, run_record):
    page = Page(page_of(kind))
    assert re.search(rf'<p class="verdict-word">.*<span>{word}</span></p>', page_of(kind))
    assert score in page.text
    assert run_record(kind).policy_digest in page.text


def test_what_a_policy_changes_stands_before_the_score_and_all_of_it_is_folded(page_of, report_of):
    text = page_of("mild")
    found = re.search(
        r'<p class="alert">.*?</p>\s*<details class="policy-changes">.*?</details>', text, re.S
    )
    assert found
    assert found.end() < text.index('<div class="score">')
    folded = Page(found.group().partition("</p>")[2])
    changes = report_of("mild").headline.policy_changes
    assert folded.text == " ".join((f"All {len(changes)} changes of the policy", *changes))
    assert len(folded.all("li")) == len(changes)


def test_few_changes_are_not_folded_and_the_shipped_policy_is_not_spoken_of(page_of):
    assert "changes of the policy" not in page_of("pass")
    assert "not the one that ships" not in page_of("pass")
    for count, folded in ((4, False), (5, True)):
        weights = dict.fromkeys(list(support.POLICY.suite_weights)[:count], 1)
        policy = support.changed_policy(suite_weights={**support.POLICY.suite_weights, **weights})
        text = render_html(build_report(support.mild_record(policy), policy))
        assert "not the one that ships" in text
        assert (f"All {count} changes of the policy" in text) is folded


def test_no_policy_makes_the_page_too_large(report_of):
    many = tuple(f"threshold t{i} is {'x' * 80}, shipped 1" for i in range(201))
    report = dataclasses.replace(
        report_of("pass"),
        headline=dataclasses.replace(report_of("pass").headline, policy_changes=many),
    )
    text = render_html(report)
    assert "<li>threshold t199 is" in text
    assert "threshold t200 is" not in text
    assert ">1 more; <code>policy.json</code> has the whole policy." in text


def test_at_most_five_reasons_are_shown_each_with_a_link(run_record):
    missing = {e.id: "fail" for e in support.POLICY.catalogue if e.severity == "high"}
    report = build_report(support.record(support.items_of_all(missing)), support.POLICY)
    text = render_html(report)
    listed = re.search(r'<ol class="reasons">(.*?)</ol>', text, re.DOTALL).group(1)
    rows = listed.split("<li>")[1:]
    assert len(rows) == 5
    assert all('<a href="#check-' in row for row in rows)
    assert f"{len(report.reasons) - 5} more below" in text


def test_every_check_in_scope_has_its_details(page_of, run_record):
    text = page_of("fail")
    checks = run_record("fail").checks
    assert len(checks) == 148
    assert text.count('<details class="check"') == 148
    opened = text.count(" open>")
    assert opened == sum(c.outcome in (Outcome.FAIL, Outcome.ERROR) for c in checks) > 0
    assert all(f'id="check-{check.id}"' in text for check in checks)


def test_tables_have_captions_and_scopes(page):
    assert len(page.all("table")) == len(page.all("caption")) > 5
    assert all(attributes.get("scope") in {"row", "col"} for attributes in page.all("th"))


def test_a_state_is_an_icon_and_a_word_besides_its_colour(page_of):
    for badge in re.findall(r'<span class="badge [^"]+">(.*?)</span>', page_of("fail")):
        assert badge.startswith('<svg aria-hidden="true"><use href="#icon-')
        assert badge.partition("</svg>")[2].strip()


def test_a_log_has_no_terminal_sequences():
    items = support.items_of_all()
    log = "\x1b[31mE   assert 1 == 2\x1b[0m\r\nline two\x07\x1b]8;;http://x\x07link\x1b]8;;\x07"
    items[0] = support.item(items[0].check, "fail", reason="r", log=log)
    text = render_html(build_report(support.record(items), support.POLICY))
    assert "E   assert 1 == 2\nline two\\u0007link</pre>" in text


def test_python_warnings_stand_with_their_item():
    items = support.items_of_all()
    items[0] = support.item(items[0].check, warnings=["UserWarning: <old> \x1b[31mthing (a.py:3)"])
    text = render_html(build_report(support.record(items), support.POLICY))
    assert text.count("Python warnings while it ran") == 1
    assert "UserWarning: &lt;old&gt; thing (a.py:3)</pre>" in text


def test_a_run_too_large_for_the_page_says_what_is_left_out():
    rows = [
        support.evidence("", f"n{i}", i + 0.5, limit=1e9, direction="at_most", reason="r" * 300)
        for i in range(40)
    ]
    rows.append(support.evidence("", "missed", 2.0, limit=1.0, direction="at_most", reason="why"))
    items = [
        support.item(i.check, "fail", reason="x" * 3000, log="line of a log\n" * 5000, rows=rows)
        for i in support.items_of_all()
    ]
    report = build_report(support.record(items), support.POLICY)
    text = render_html(report)
    assert len(text.encode()) <= html.MAX_BYTES
    page = Page(text)
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {a["href"][1:] for a in page.all("a")} <= ids
    assert text.count('<details class="check"') == 148
    assert "run.json" in page.text


def test_no_cell_of_the_evidence_is_longer_than_a_reason():
    text = {"name": "n" * 5000, "value": "v" * 5000, "limit": "l" * 5000, "reason": "r" * 5000}
    rows = [support.evidence("", text.pop("name"), text.pop("value"), direction="equal", **text)]
    record = support.record([support.item("data.balance", "fail", rows=rows)])
    page = render_html(build_report(record, support.POLICY))
    assert max(len(word) for letter in "nvlr" for word in re.findall(f"{letter}+", page)) < 2000


def test_the_last_loss_is_in_the_table_of_the_curve(page_of):
    table = page_of("pass").partition("one in 2 of 60 points, and the last")[2]
    rows = re.findall(r'<tr><td class="num">([^<]*)</td>', table.partition("</table>")[0])
    assert rows[:2] + rows[-2:] == ["0", "20", "580", "590"]


def test_missed_limits_are_the_last_to_be_left_out():
    rows = [support.evidence("", f"n{i}", 1.0) for i in range(300)]
    rows.append(support.evidence("", "missed", 2.0, limit=1.0, direction="at_most", reason="why"))
    items = support.items_of_all()
    items[0] = support.item(items[0].check, "fail", reason="r", rows=rows)
    text = render_html(build_report(support.record(items), support.POLICY))
    assert "200 of 301 values; the rest is in run.json" in text
    assert "<code>missed</code>" in text


def test_a_link_to_a_row_that_is_left_out_leads_to_its_check():
    soft = {"limit": 1.0, "direction": "at_most", "level": "warn"}
    rows = [support.evidence("", f"missed{i}", 2.0, **soft) for i in range(250)]
    rows.append(support.evidence("", "accuracy", 0.9))
    record = support.record([support.item("gates.accuracy", "warn", rows=rows)])
    page = Page(render_html(build_report(record, support.POLICY)))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert "e-gates.accuracy-251" not in ids
    assert {a["href"][1:] for a in page.all("a")} <= ids


@pytest.mark.parametrize("kind", ["fail", "compared", "mild"])
def test_the_same_run_gives_the_same_bytes_in_another_process(page_of, kind):
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import support\n"
        "from forge_harness.report import build_report, render_html\n"
        "against = support.AGAINST.get(sys.argv[2], tuple)()\n"
        "policy = support.POLICIES.get(sys.argv[2], support.POLICY)\n"
        "report = build_report(support.RECORDS[sys.argv[2]](), policy, *against)\n"
        "page = render_html(report)\n"
        "print(hashlib.sha256(page.encode()).hexdigest())"
    )
    directory = str(support.__file__).rpartition("/")[0]
    done = subprocess.check_output(
        [sys.executable, "-c", code, directory, kind], text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.strip() == hashlib.sha256(page_of(kind).encode()).hexdigest()


def test_matplotlib_is_imported_for_curves_only():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import support\n"
        "from forge_harness.report import build_report, render_html\n"
        "items = [support.item('data.balance')]\n"
        "page = render_html(build_report(support.record(items), support.POLICY))\n"
        "assert 'No check of this run recorded accuracy' in page\n"
        "print(*[n for n in ('matplotlib', 'torch') if n in sys.modules])"
    )
    directory = str(support.__file__).rpartition("/")[0]
    assert subprocess.check_output([sys.executable, "-c", code, directory], text=True).split() == []


def test_what_is_void_is_seen_to_be(page_of):
    section = page_of("fail").partition('<h2 id="load">')[2].partition("<h2 ")[0]
    assert section.count('<tr class="void">') == 1
    row = section.partition('<tr class="void">')[2].partition("</tr>")[0]
    assert "the generator used 99 % of a core; 3 not sent" in row
    assert "Values below are of checks that did not all pass" in section
    for plot in section.split('<svg class="plot"')[1:]:
        assert ">23x void</text>" in plot
        assert "<pattern" in plot
        assert "Void: 23x, the generator used 99 % of a core; 3 not sent." in plot
    assert "void" not in page_of("pass").partition("</style>")[2]


@pytest.mark.parametrize("values", [[1e308, -1e308], [1e308, 1e308], [3.4e38, 1.0], [5e-324, 0.0]])
def test_values_beyond_every_axis_are_shown(values):
    rows = [
        support.evidence("", "accuracy.digits.full", 0.5),
        support.evidence("", "loss_curve.digits.full", values[0], samples=values),
        support.evidence("", "loss_curve_steps.digits.full", 2, samples=[0.0, 10.0]),
    ]
    found = support.record([support.item("gates.quantized_accuracy_ratio", rows=rows)])
    report = build_report(found, support.POLICY)
    assert "Loss curves of digits" in render_html(report)
    assert json.loads(render_json(report))["quality"]
