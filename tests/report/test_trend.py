"""The runs that lead up to a run: which are shown, where they do not compare, and the picture."""

from __future__ import annotations

import re

import pytest

from forge_harness.integration.kept_runs import kept_run, leading_to
from forge_harness.report import build_report, render_html, render_markdown
from forge_harness.report.model import TrendFigure
from forge_harness.report.trend_plot import figure_line, segments, trend_plot
from forge_harness.scoring import Scope
from forge_harness.types import Profile

from . import support


@pytest.fixture(scope="module")
def trend(report_of):
    return report_of("compared").trend


def up_to(record, *runs, **options):
    history = support.history_of(record, [(run, support.POLICY) for run in runs], **options)
    return build_report(record, support.POLICY, None, history).trend


def ids(trend):
    return [point.run_id for point in trend.points]


def test_the_kept_runs_come_first_and_this_one_last(trend):
    assert ids(trend) == ["run-2", "run-3", "run-4", "run-5", "run-28"]
    assert [point.is_this for point in trend.points] == [False] * 4 + [True]
    last = trend.points[-1]
    assert (last.verdict, last.low, last.high, last.failed, last.not_measured) == (
        "FAIL",
        49,
        49,
        3,
        1,
    )
    assert trend.points[0].commit == "01234567+"
    assert trend.points[0].digest == "sha256:run-2"
    assert last.duration_s == 12 * 60


def test_breaks_are_where_two_do_not_compare(trend):
    breaks = [point.breaks for point in trend.points]
    assert [len(found) for found in breaks] == [0, 2, 1, 0, 0]
    assert [text.partition(" ")[0] for text in breaks[1]] == ["machine", "policy"]
    assert breaks[2] == ("machine class Linux/x86_64/EPYC/4 -> Linux/x86_64/Xeon/4",)
    assert [point.compares for point in trend.points] == [False, False, True, True, True]


def test_what_is_not_shown_is_counted(trend):
    assert trend.left_out == (
        "1 run began later",
        "2 runs without a score: unfinished, damaged or not verified",
    )


def test_another_profile_is_a_break_and_another_selection_or_subject_is_left_out():
    record = support.kept_record(9)
    quick = support.kept_record(2, scope=Scope(profile=Profile.QUICK))
    part = support.kept_record(3, scope=Scope(profile=Profile.FULL, suites=("data",)))
    other = record.subject.model_copy(update={"spec": "other"})
    stranger = support.kept_record(4, subject=other)
    trend = up_to(record, quick, part, stranger, support.kept_record(5))
    assert ids(trend) == ["run-2", "run-5", "run-9"]
    assert trend.points[1].breaks == ("profile quick -> full",)
    assert trend.left_out == ("2 runs of another subject or selection",)


def test_only_the_newest_are_shown():
    record = support.kept_record(28)
    trend = up_to(record, *map(support.kept_record, range(1, 9)), most=3)
    assert ids(trend) == ["run-6", "run-7", "run-8", "run-28"]
    assert trend.left_out == ("5 runs older than these",)


def test_the_run_itself_is_not_one_before_it():
    record = support.kept_record(5)
    trend = up_to(record, support.kept_record(4), record)
    assert ids(trend) == ["run-4", "run-5"]
    assert trend.left_out == ()


def test_times_are_compared_as_times_and_not_as_text():
    """09:00 in New York is later than 12:00 in Greenwich."""
    record = support.kept_record(5, started_at="2026-01-05T12:00:00Z", finished_at=None)
    later = support.kept_record(4, started_at="2026-01-05T09:00:00-05:00", finished_at=None)
    assert ids(up_to(record, later)) == ["run-5"]


def test_a_run_that_never_ended_has_no_duration():
    run = support.kept_record(2, state="interrupted", finished_at=None)
    trend = up_to(support.kept_record(3), run)
    assert (trend.points[0].duration_s, trend.points[0].state) == (None, "interrupted")


def test_figures_are_gates_with_gaps_where_one_was_not_measured(trend):
    figures = {figure.name: figure for figure in trend.figures}
    latency = figures["latency"]
    assert latency.unit == "s"
    assert latency.values[2:] == (None, 0.05, 0.07)
    assert latency.anchor == "check-gates.latency"
    assert figures["accuracy"].values[2:] == (0.91, 0.9, 0.97)


def test_values_of_two_units_are_two_figures():
    record = support.kept_record(3, values={"latency": 0.05})
    kept = kept_run(support.kept_record(2, values={"latency": 0.04}), support.POLICY, "")
    figures = {n: f.model_copy(update={"unit": "ms"}) for n, f in kept.figures.items()}
    history = leading_to(record, [kept.model_copy(update={"figures": figures})])
    trend = build_report(record, support.POLICY, None, history).trend
    found = [(f.unit, f.values) for f in trend.figures if f.name == "latency"]
    assert found == [("ms", (0.04, None)), ("s", (None, 0.05))]


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        ([False], [(0, 1)]),
        ([False, False, True], [(0, 2), (2, 3)]),
        ([False, True, True, False], [(0, 1), (1, 2), (2, 4)]),
    ],
)
def test_lines_end_at_breaks(breaks, found):
    assert [(part.start, part.stop) for part in segments(breaks)] == found


def drawn(svg, name):
    return re.findall(rf'<path class="{name}" d="([^"]*)"', str(svg))


def test_the_plot_draws_the_interval_of_each_run(trend):
    svg = trend_plot(trend)
    # Five runs, each in the middle of its fifth; two breaks, so three lines.
    assert drawn(svg, "trend-break") == ["M20 0V100", "M40 0V100"]
    lows = [point.low for point in trend.points]
    assert drawn(svg, "trend-low") == [
        f"M10 {100 - lows[0]}",
        f"M30 {100 - lows[1]}",
        f"M50 {100 - lows[2]}L70 {100 - lows[3]}L90 {100 - lows[4]}",
    ]
    high = [100 - point.high for point in trend.points]
    assert f"M50 {100 - lows[2]}L50 {high[2]}" in drawn(svg, "trend-span")[2]
    assert drawn(svg, "trend-area")[2].startswith(f"M50 {high[2]}L70 {high[3]}L90 {high[4]}L90 ")
    measured = [100 - 100 * point.measured for point in trend.points]
    assert drawn(svg, "trend-measured")[0] == f"M10 {measured[0]:.6g}"
    assert "<desc" in svg
    assert "5 runs, 2 breaks." in svg


def course_of(*values):
    return TrendFigure(
        name="x", unit="1", anchor=None, values=values, before=None, comparable=values
    )


def test_a_figure_is_drawn_with_gaps_and_its_ends_in_words():
    figure = course_of(1.0, None, 3.0, 2.0, 2.0)
    svg = figure_line(figure, [False, False, False, False, True])
    # 120 wide, so 24 a run; 24 high with an edge of 3: 3.0 is at 3, 2.0 at 12, 1.0 at 21.
    assert drawn(svg, "spark-line") == ["M12 21M60 3L84 12M108 12"]
    assert drawn(svg, "spark-dots") == ["M12 21h0M60 3h0M84 12h0M108 12h0"]
    assert 'aria-label="x: from 1 to 2, between 1 and 3, of runs that do not all comp' in svg


def test_a_value_that_is_missing_now_is_not_the_end_of_the_course_in_words():
    svg = figure_line(course_of(1.0, 2.0, None), [False] * 3)
    assert 'aria-label="x: from 1 to 2, between 1 and 2; not measured in this run"' in svg


@pytest.mark.parametrize(("cpu", "shown"), [("EPYC", "does not compare"), ("Xeon", "0.5")])
def test_numbers_beside_this_run_are_of_runs_that_compare(cpu, shown):
    before = support.kept_record(4, values={"accuracy": 0.5}, cpu=cpu)
    own = support.kept_record(5, values={"accuracy": 0.9})
    history = support.history_of(own, [(before, support.POLICY)])
    page = render_html(build_report(own, support.POLICY, None, history))
    table = page.partition("Gate values over the runs")[2].partition("</table>")[0]
    row = re.search(r"<tr><th[^>]*><a[^>]*>accuracy</a>.*?</tr>", table)[0]
    _, then, now, lowest, highest = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert re.sub("<[^>]+>", "", then) == shown
    assert (now, lowest, highest) == ("0.9", "0.9" if cpu == "EPYC" else "0.5", "0.9")


@pytest.mark.parametrize("values", [(5.0, 5.0), (-1.7e308, 1.7e308), (0.0, 5e-324)])
def test_extreme_values_can_be_drawn(values):
    svg = figure_line(course_of(*values), [False, False])
    assert "nan" not in svg
    assert "inf" not in svg


def test_every_number_of_the_picture_is_in_a_table(page_of, trend):
    section = page_of("compared").partition('<h2 id="trend">')[2].partition("<h2 ")[0]
    cells = re.sub(r"<[^>]+>", " ", section).split()
    for point in trend.points:
        assert str(point.low) in " ".join(cells).replace("\u2013", " ").replace("&ndash;", " ")
    for figure in trend.figures:
        for value in figure.values:
            assert value is None or f"{value:.6g}".rstrip("0").rstrip(".") in cells or value >= 1e4
    assert "Break: machine class Linux/x86_64/EPYC/4 -&gt; Linux/x86_64/Xeon/4." in section


def test_without_a_history_it_says_how_to_get_one(report_of, page_of):
    assert report_of("pass").trend is None
    assert "forge-harness report DIR --history RUNS" in page_of("pass")
    assert "Trend" not in render_markdown(report_of("pass"))


def test_a_history_without_a_run_before_is_said_to_be_empty():
    record = support.kept_record(5)
    history = support.history_of(record, [(support.kept_record(6), support.POLICY)])
    report = build_report(record, support.POLICY, None, history)
    page = render_html(report)
    assert "No kept run leads up to this one." in page
    assert "Not shown: 1 run began later." in page
    assert "trend-plot" not in page.partition("</style>")[2]


def test_markdown_has_a_row_a_run_and_one_a_break(report_of):
    text = render_markdown(report_of("compared"))
    block = text.split("### Trend")[1].split("###")[0]
    rows = [row for row in block.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 5 + 2
    assert rows[1].startswith("| break: machine class")
    assert "| this run |" in rows[-1]
    assert "Not shown: 1 run began later; 2 runs without a score" in block
