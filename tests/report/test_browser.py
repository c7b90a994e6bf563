"""The page in a browser: both colour schemes, wide and narrow, no script, no request."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CONTRAST = """
() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const rgba = parse(getComputedStyle(node).backgroundColor);
      if (rgba.length === 3 || rgba[3] > 0) return rgba;
    }
    return [255, 255, 255];
  };
  const worst = {};
  for (const node of document.querySelectorAll('main *, nav *')) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || node.closest('svg') || node.closest('.visually-hidden')) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = node.tagName + '.' + node.className;
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return Object.entries(worst).filter(([, ratio]) => ratio < 4.5);
}
"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; install Debian's chromium to test the page in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture(params=[(s, w) for s in ("light", "dark") for w in (1280, 400)], ids=str)
def opened(request, browser, tmp_path, page_of):
    """Opens a kind of run; fails at teardown on any message of the console or any request."""
    scheme, width = request.param
    seen = []
    context = browser.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
        offline=True,
        java_script_enabled=True,
    )
    page = context.new_page()
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    requests = []
    page.on("request", lambda request: requests.append(request.url))

    def show(kind, anchor=""):
        file = tmp_path / f"{kind}.html"
        file.write_text(page_of(kind), encoding="utf-8")
        page.goto(file.as_uri() + anchor)
        return page

    yield show
    own = [url for url in requests if url.startswith(tmp_path.as_uri()) or url == "data:,"]
    context.close()
    assert seen == []
    assert requests == own


@pytest.mark.parametrize("kind", ["fail", "hostile", "compared", "mild"])
def test_it_shows_without_errors_requests_or_sideways_scrolling(opened, kind):
    page = opened(kind)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    assert page.locator("details.check").count() == 148


@pytest.mark.parametrize("kind", ["fail", "compared", "mild"])
def test_every_text_has_contrast(opened, kind):
    page = opened(kind)
    assert page.evaluate(CONTRAST) == []


def test_a_link_opens_the_check_it_leads_to(opened):
    page = opened("fail")
    body = page.locator('[id="check-data.splits_disjoint"]')
    assert not body.is_visible()
    page.goto(page.url + "#check-data.splits_disjoint")
    body.wait_for(state="visible")


def test_the_trend_has_its_size_and_its_colours(opened):
    page = opened("compared")
    plot = page.locator(".trend-plot")
    box = plot.bounding_box()
    assert box["width"] > 250
    assert box["height"] > 150
    drawn = ["trend-area", "trend-span", "trend-low", "trend-dots", "trend-measured", "trend-break"]
    for name in drawn:
        style = "s => [getComputedStyle(s).stroke, getComputedStyle(s).fill]"
        stroke, fill = plot.locator(f".{name}").first.evaluate(style)
        assert "rgb" in (fill if name == "trend-area" else stroke)
    # The labels stand at the lines they name: 100, 80, 50 and 0 of the height.
    tops = page.evaluate(
        "[...document.querySelectorAll('.trend-scale li')].map(l => l.getBoundingClientRect())"
        ".map(b => b.top + b.height / 2)"
    )
    for top, share in zip(tops, (0, 0.2, 0.5, 1), strict=True):
        assert abs(top - box["y"] - share * box["height"]) < 2
    assert page.locator("tr.break").count() == 2


def test_the_filter_works_without_scripts(opened):
    page = opened("fail")
    page.locator("#show-fail").check()
    assert page.locator("details.check:visible").count() == 3
    page.locator("#show-none").check()
    assert page.locator("details.check:visible").count() == 2
    page.locator("#show-all").check()
    assert page.locator("details.check:visible").count() == 148


def test_a_link_leads_past_the_filter(opened):
    page = opened("fail")
    page.locator("#show-pass").check()
    body = page.locator('[id="check-architecture.weight_scale"]')
    assert not body.is_visible()
    page.locator('ol.reasons a[href="#check-architecture.weight_scale"]').first.click()
    body.wait_for(state="visible")
    body.evaluate("e => new Promise(requestAnimationFrame)")
    assert body.evaluate("e => e.getBoundingClientRect().top < innerHeight")


def test_the_keyboard_reaches_the_content_with_a_visible_focus(opened):
    page = opened("pass")
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert focused.inner_text() == "Skip to the verdict"
    box = focused.bounding_box()
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_colours_follow_the_scheme(browser, tmp_path, page_of):
    file = tmp_path / "page.html"
    file.write_text(page_of("pass"), encoding="utf-8")
    colours = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, offline=True)
        page = context.new_page()
        page.goto(file.as_uri())
        colours[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.plot path[stroke^=\"var\"]')).stroke]"
        )
        context.close()
    assert colours["light"][0] == "rgb(255, 255, 255)"
    assert colours["dark"][0] != colours["light"][0]
    assert colours["dark"][1] != colours["light"][1]


@pytest.mark.parametrize("kind", ["fail", "compared", "hostile"])
def test_no_table_is_wider_than_the_paper(browser, tmp_path, page_of, kind):
    """One that is would have the browser shrink every page."""
    file = tmp_path / "page.html"
    file.write_text(page_of(kind), encoding="utf-8")
    # A4 without margins of a centimetre.
    context = browser.new_context(viewport={"width": 718, "height": 1000}, offline=True)
    page = context.new_page()
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    rights = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    assert page.evaluate(f"Math.max(...{rights})") <= 718
    context.close()


def test_print_shows_what_is_folded(browser, tmp_path, page_of):
    file = tmp_path / "page.html"
    file.write_text(page_of("pass"), encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    height = "document.querySelector('details.check').offsetHeight"
    printed = page.evaluate(height)
    page.emulate_media(media="screen")
    assert printed > 2 * page.evaluate(height)
    context.close()
