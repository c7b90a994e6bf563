"""The step summary: what it says, that nothing in it is markup of others, its size."""

from __future__ import annotations

import dataclasses
import re

from forge_harness.report import build_report, markdown, render_markdown
from forge_harness.report.markdown import escape

from . import support


def test_it_starts_with_verdict_and_score(report_of):
    lines = render_markdown(report_of("fail")).splitlines()
    assert lines[0] == "## \u274c FAIL: a measured violation blocks"
    assert lines[2].startswith("**Integration score 49 \\(at most 49\\), 98 % measured**")
    assert report_of("fail").headline.policy_digest.partition(":")[2] in lines[4]


def test_failed_and_not_measured_checks_are_listed_with_their_commands(report_of):
    text = render_markdown(report_of("fail"))
    failed = text.partition("### What failed (3)")[2].partition("###")[0]
    for check in ("architecture.weight\\_scale", "security.tls\\_1\\_3\\_only", "data.balance"):
        assert f"<code>{check}</code>" in failed
    half = text.partition("### What warned, was flaky or is waived (2)")[2].partition("###")[0]
    assert "| <code>training.overfit\\_one\\_batch</code> | high | flaky |" in half
    assert "| <code>state.io\\_errors</code> | high | xfail | waived until" in half
    missing = text.partition("### What was not measured (2)")[2].partition("###")[0]
    assert "<code>gates.latency</code>" in missing
    assert "forge\\-harness run \\-\\-check gates.latency" in missing


def test_what_a_policy_changes_is_quoted_and_folded(report_of):
    changes = report_of("mild").headline.policy_changes
    head = render_markdown(report_of("mild")).partition("### Changes")[0]
    assert "\n> The policy is not the one that ships with this harness&#58; threshold gates" in head
    block = head.partition("<details><summary>All 7 changes of the policy</summary>\n\n")[2]
    listed = block.partition("\n\n</details>\n\n")[0]
    assert listed.splitlines() == [f"- {escape(change)}" for change in changes]
    assert "changes of the policy" not in render_markdown(report_of("fail"))


def test_many_changes_of_a_policy_are_counted(report_of):
    for count, more in (
        (4, None),
        (100, ""),
        (101, "- and 1 more; policy.json has the whole policy"),
    ):
        many = tuple(f"threshold t{i} is 1, shipped 2" for i in range(count))
        head = dataclasses.replace(report_of("pass").headline, policy_changes=many)
        text = render_markdown(dataclasses.replace(report_of("pass"), headline=head))
        assert ("<details>" in text) is (more is not None)
        assert ("policy.json has the whole policy" in text) is bool(more)
        assert (more or "") in text
        assert text.count("- threshold t") == (0 if more is None else 100)


def test_text_of_others_is_no_markup():
    hostile = "<b> [x](http://e) @team | `a` *b* #1 &lt; ![i](j)\nwww.e.org"
    assert escape(hostile) == (
        "&lt;b&gt; \\[x\\]\\(http&#58;//e\\) &#64;team &#124; &#96;a&#96; \\*b\\* \\#1 &amp;lt; "
        "\\!\\[i\\]\\(j\\) www&#46;e.org"
    )


def test_tables_keep_their_columns_whatever_is_in_them(report_of):
    text = render_markdown(report_of("hostile"))
    assert "<script" not in text
    assert "<img" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in block.splitlines()}) == 1


def test_it_fits_a_step_summary(monkeypatch):
    reason = "\u00e4|" * 5000
    items = [support.item(i.check, "fail", reason=reason) for i in support.items_of_all()]
    report = build_report(support.record(items), support.POLICY)
    text = render_markdown(report)
    assert len(text.encode()) <= markdown.MAX_BYTES
    assert "and 47 more; the HTML report lists all." in text
    monkeypatch.setattr(markdown, "MAX_BYTES", 5000)
    cut = render_markdown(report)
    assert len(cut.encode()) <= 5000
    assert cut.endswith("*Cut here; the HTML report has all of it.*\n")


def test_without_a_baseline_it_says_so(report_of, run_record):
    assert "No baseline." in render_markdown(report_of("pass"))
    report = build_report(run_record("fail"), support.POLICY, run_record("pass"))
    changes = render_markdown(report).partition("### Changes against")[2].partition("###")[0]
    assert (
        "- Newly failing: <code>data.balance</code> (pass before, fail now), <code>arch" in changes
    )
    assert "- Fixed: none" in changes


def test_void_phases_and_checks_that_did_not_pass_are_named_with_their_values(report_of):
    text = render_markdown(report_of("fail"))
    block = text.split("### Under load")[1].split("###")[0]
    assert "> Values of checks that did not all pass: <code>performance.load\\_10x</code>" in block
    assert (
        "| 23x \\(void&#58; the generator used 99 % of a core; 3 not sent\\) | ~~184~~ |" in block
    )
    assert "| 1x | 8 |" in block
    assert "did not all pass" not in render_markdown(report_of("pass"))


def test_the_load_has_a_row_for_each_phase(report_of):
    text = render_markdown(report_of("pass"))
    block = text.split("### Under load")[1].split("###")[0]
    assert re.search(r"\| 23x \| 184 \| 80 \| 160 \| 208 \| 0 \|.*not measured \|", block)
    assert "- p95 at base load: 0.03 s" in block
