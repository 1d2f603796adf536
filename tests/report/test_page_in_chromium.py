"""The page in a real Chromium: legible on any screen, usable by keyboard, alive, and quiet."""

import itertools
import json
import threading

import pytest

from launch.report_server import PageServer
from tests.report.browser import chromium, needs_browser, opened
from tests.report.made_runs import SMALL, bare_run, finished_run, write_metrics
from tests.trainer.runs import pack_images
from trainer.report import Looks, look, names, read_contents, read_settings
from trainer.report.live import LiveReport
from trainer.report.page import content_security_policy, page, write_page

pytestmark = [needs_browser, pytest.mark.slow]

PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Address of the page of a run with everything."""
    folder = tmp_path_factory.mktemp("one")
    data = pack_images(folder / "data", count=72, side=32)
    run = finished_run(folder / "run", data)
    write_metrics(run, 200, skipped=1.0, substitutes=3)
    contents = read_contents(run, look(run, read_settings(run), SMALL))
    assert contents.missing == ()
    write_page(folder / "page.html", page([contents]))
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Address of a page of three runs, one with a hostile name."""
    folder = tmp_path_factory.mktemp("several")
    runs = [
        bare_run(folder / "a-run-with-a-long-name-that-nobody-would-type-by-hand-twice"),
        bare_run(folder / "<script>document.title='taken'<", seed=7),
        bare_run(folder / "c", recipe="</script><img src=x onerror=\"document.title='taken'\">"),
    ]
    told = [read_contents(run, Looks(), name) for run, name in zip(runs, names(runs))]
    write_page(folder / "page.html", page(told))
    return (folder / "page.html").as_uri()


# --- legible ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_nothing_scrolls_sideways(browser, one, several, width):
    for url in (one, several):
        with opened(browser, url, viewport={"width": width, "height": 740}) as shown:
            for details in shown.locator("details").all():
                details.evaluate("each => (each.open = true)")
            assert shown.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_axe_finds_no_fault(browser, one, several, width, scheme):
    """Deque's checker: contrast, names, landmarks, headings, tables and much else."""
    from axe_core_python.sync_playwright import Axe

    for url in (one, several):
        size = {"width": width, "height": 740}
        with opened(browser, url, viewport=size, color_scheme=scheme) as shown:
            for details in shown.locator("details").all():
                details.evaluate("each => (each.open = true)")
            found = Axe().run(shown)["violations"]
            assert [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found] == []


CONTRASTS = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const c = part / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = (colour) => {
    const other = luminance(colour);
    return (Math.max(page, other) + 0.05) / (Math.min(page, other) + 0.05);
  };
  const least = (selector, property) =>
    Math.min(...[...document.querySelectorAll(selector)]
      .map((each) => ratio(getComputedStyle(each)[property])));
  return {
    text: least("svg text", "fill"),
    lines: least(".plot .line", "color"),
    bars: least(".bar", "fill"),
    points: least(".point", "fill"),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_stands_out_from_the_page(browser, one, scheme):
    """WCAG 1.4.3 for text and 1.4.11 for graphics; axe looks at neither inside SVG."""
    with opened(browser, one, color_scheme=scheme) as shown:
        ratios = shown.evaluate(CONTRASTS)
    assert ratios.pop("text") >= 4.5
    assert all(ratio >= 3 for ratio in ratios.values()), ratios


OVERLAPS = """() => [...document.querySelectorAll("main svg[viewBox]")].flatMap((svg) => {
  const texts = [...svg.querySelectorAll("text")]
    .map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, box]) => box.width > 0);
  const found = [];
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    if (p.left < q.right && q.left < p.right && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      found.push(`${a} | ${b}`);
  }));
  return found;
})"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll("main svg text")]
  .filter((t) => t.getBoundingClientRect().width > 0)
  .map(({ ownerSVGElement: svg }) => 11 * svg.clientWidth / svg.viewBox.baseVal.width))"""


@pytest.mark.parametrize("width", [360, 1280])
def test_labels_are_large_enough_and_none_lies_over_another(browser, one, several, width):
    for url in (one, several):
        with opened(browser, url, viewport={"width": width, "height": 740}) as shown:
            for log in (False, True):
                if log:
                    for button in shown.get_by_role("button", name="logarithmic scale").all():
                        button.click()
                assert shown.evaluate(OVERLAPS) == []
                assert shown.evaluate(SMALLEST) >= 9  # pixels


def test_print_is_light_and_without_controls(browser, one):
    with opened(browser, one, color_scheme="dark") as shown:
        shown.emulate_media(media="print", color_scheme="dark")
        assert (
            shown.evaluate("getComputedStyle(document.body).backgroundColor")
            == "rgb(255, 255, 255)"
        )
        for name in ("figcaption button", "input", "nav"):
            assert not any(each.is_visible() for each in shown.locator(name).all())
        assert shown.locator("#time .legend").get_by_text("forward").is_visible()
        assert shown.locator("#curve-loss svg").first.is_visible()
        assert shown.pdf(format="A4").startswith(b"%PDF")


def test_motion_is_the_readers_choice(browser, one):
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    with opened(browser, one, reduced_motion="reduce") as shown:
        assert shown.evaluate(behaviour) == "auto"


def test_every_image_says_what_it_is(browser, one):
    with opened(browser, one) as shown:
        images = shown.locator("img").all()
        assert len(images) > 6 * 3 + 4 * (1 + 2 * 3)
        assert all(image.get_attribute("alt") for image in images)
        assert all(image.evaluate("i => i.complete && i.naturalWidth > 0") for image in images)


# --- alive --------------------------------------------------------------------------------------


def test_pointing_at_a_curve_reads_it(browser, one):
    with opened(browser, one) as shown:
        chart = shown.locator("#curve-loss")
        chart.locator(".plot").hover(position={"x": 100, "y": 60})
        read = chart.locator(".readout").inner_text()
        assert read.startswith("step ")
        assert read.endswith(" nats")
        assert chart.locator(".cursor circle").count() == 1
        shown.mouse.move(0, 0)
        assert chart.locator(".readout").inner_text() == ""


def test_the_keyboard_reads_a_curve(browser, one):
    with opened(browser, one) as shown:
        slider = shown.get_by_role("slider", name="Loss (nats): step to read")
        slider.focus()
        assert slider.get_attribute("aria-valuetext") == "step 200: -15 nats"
        for _ in range(3):
            shown.keyboard.press("ArrowLeft")
        told = shown.locator("#curve-loss .readout").inner_text()
        assert told == slider.get_attribute("aria-valuetext")
        assert told != "step 200: -15 nats"
        assert slider.evaluate("s => getComputedStyle(s).outlineStyle") == "solid"


PLACE = """[document.activeElement.getBoundingClientRect().top + scrollY,
  document.activeElement.id]"""


def test_tab_reaches_everything_in_the_order_of_the_page(browser, one):
    with opened(browser, one, **PHONE) as shown:
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip-link"
        assert shown.locator(".skip-link").evaluate("s => s.getBoundingClientRect().left") >= 0
        places = []
        for _ in range(150):
            shown.keyboard.press("Tab")
            top, identity = shown.evaluate(PLACE)
            if shown.evaluate("document.activeElement === document.body"):
                break
            places.append((top, identity))
        assert "map-0-slider" in [identity for _, identity in places]
        tops = [top for top, _ in places]
        assert all(b >= a - 45 for a, b in itertools.pairwise(tops))  # a line holds several


def test_a_curve_can_be_logarithmic(browser, one):
    with opened(browser, one) as shown:
        chart = shown.locator("#curve-contrastive_top1")
        button = chart.get_by_role("button", name="Contrastive top-1 (%): logarithmic scale")
        assert button.get_attribute("aria-pressed") == "false"
        button.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        assert not chart.locator(".scale.linear").is_visible()
        assert chart.locator(".scale.log").is_visible()


def test_a_run_can_be_hidden_in_all_charts(browser, several):
    with opened(browser, several) as shown:
        button = shown.locator("#curves-toggle-1")
        assert "script" in button.inner_text()
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        lines = shown.locator("#curves .plot .linear [data-series='1']").all()
        assert len(lines) >= 5
        assert not any(line.is_visible() for line in lines)
        assert shown.locator("#curve-loss .linear [data-series='0']").is_visible()


def test_the_map_shows_images_to_pointer_and_keyboard(browser, one):
    painted = """c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data
        .some((part, index) => index % 4 < 3 && part > 0)"""
    with opened(browser, one, **PHONE) as shown:
        facts = json.loads(shown.locator("#map-0").get_attribute("data-facts"))
        thumbnail = shown.locator(".thumbnail")
        plot = shown.locator("#map-0 .map .plot").nth(1)
        x, y = facts["points"][1][7]
        box = plot.bounding_box()
        plot.hover(position={"x": x / 360 * box["width"], "y": y / 360 * box["height"]})
        assert thumbnail.is_visible()
        assert facts["texts"][7] == thumbnail.inner_text()
        assert thumbnail.locator("canvas").evaluate(painted)
        shown.keyboard.press("Escape")
        assert not thumbnail.is_visible()

        slider = shown.get_by_role("slider", name="Image on the map")
        slider.focus()
        shown.keyboard.press("Home")
        shown.keyboard.press("ArrowRight")
        assert thumbnail.inner_text() == facts["texts"][1] == slider.get_attribute("aria-valuetext")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_names_of_runs_are_never_run(browser, several):
    with opened(browser, several) as shown:
        assert "taken" not in shown.title()
        assert "<script>document.title" in shown.locator("#head").inner_text()


def test_without_javascript_all_figures_and_numbers_are_there(browser, one):
    with opened(browser, one, java_script_enabled=False) as shown:
        assert shown.locator("button, input").count() == 0
        assert shown.locator("#curve-loss .scale.linear").is_visible()
        assert shown.locator("#map-0 .plot svg").first.is_visible()
        shown.locator("#curve-loss summary").click()
        assert shown.locator("#curve-loss table").is_visible()
        assert "200" in shown.locator("#curve-loss table").inner_text()


# --- live ---------------------------------------------------------------------------------------


def test_a_live_page_refreshes_without_losing_the_readers_place(browser, tmp_path):
    run = bare_run(tmp_path / "run")
    report = LiveReport([run], SMALL, 0.2)
    with PageServer(0, report.page, content_security_policy(live=True)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        lost = "net::ERR_CONNECTION"  # the browser's own words for a server that has ended
        with opened(browser, server.url, lost, reduced_motion="reduce", **PHONE) as shown:
            shown.locator("#missing").get_by_text("gone.beton").first.wait_for()
            shown.locator("#curve-gradient_norm summary").click()
            shown.locator("#curve-lr-log").click()
            slider = shown.locator("#curve-gradient_norm-slider")
            slider.focus()
            shown.keyboard.press("Home")
            before = slider.bounding_box()["y"]
            assert 0 < before < 740
            assert shown.evaluate("scrollY") > 500

            write_metrics(run, 40, skipped=1.0)
            shown.locator("#head").get_by_text("step 40 of 40").wait_for()
            assert shown.locator("#curves .events").count() == 1  # which came above the reader
            assert shown.evaluate("document.activeElement.id") == "curve-gradient_norm-slider"
            assert slider.input_value() == "0"
            assert shown.locator("#curve-gradient_norm details").evaluate("d => d.open")
            assert shown.locator("#curve-lr-log").get_attribute("aria-pressed") == "true"
            assert slider.bounding_box()["y"] == pytest.approx(before, abs=3)

            server.shutdown()
            server.server_close()
            thread.join()
            shown.get_by_text("The server has ended").wait_for()
