"""The page in a real Chromium: legible on any screen, usable by keyboard, alive, and quiet."""

import itertools
import re
import threading

import pytest

from launch.report_server import PageServer
from tests.report.browser import chromium, needs_browser, opened
from tests.report.made_runs import SMALL, bare_run, finished_run, write_metrics
from tests.trainer.runs import pack_images
from trainer.report.charts import PLOTLY
from trainer.report.contents import read_contents
from trainer.report.live import LiveReport
from trainer.report.page import content_security_policy, page, write_page
from trainer.report.pictures import Pictures, make_pictures
from trainer.state.run_data import read_settings

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
    (contents,) = read_contents([run], make_pictures(run, read_settings(run), **SMALL))
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
    told = read_contents(runs, Pictures())
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
    text: least(".main-svg text", "fill"),
    lines: least(".plot .js-line", "stroke"),
    bars: least("#phases .barlayer .point path", "fill"),
    points: least(".map .point", "fill"),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_stands_out_from_the_page(browser, one, scheme):
    """WCAG 1.4.3 for text and 1.4.11 for graphics; axe looks at neither inside SVG."""
    with opened(browser, one, color_scheme=scheme) as shown:
        ratios = shown.evaluate(CONTRASTS)
    assert ratios.pop("text") >= 4.5
    assert all(ratio >= 3 for ratio in ratios.values()), ratios


def test_charts_follow_the_readers_scheme(browser, one):
    colour = "() => getComputedStyle(document.querySelector('.main-svg text')).fill"
    with opened(browser, one, color_scheme="light") as shown:
        light = shown.evaluate(colour)
        shown.emulate_media(color_scheme="dark")
        for _ in range(100):
            if shown.evaluate(colour) != light:
                break
            shown.wait_for_timeout(50)
        assert shown.evaluate(colour) != light


OVERLAPS = """() => [...document.querySelectorAll(".plot")].flatMap((plot) => {
  const texts = [...plot.querySelectorAll(".main-svg text")]
    .map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, box]) => box.width > 0);
  const found = [];
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    if (p.left < q.right && q.left < p.right && p.top < q.bottom - 1 && q.top < p.bottom - 1)
      found.push(`${a} | ${b}`);
  }));
  return found;
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_no_label_lies_over_another(browser, one, several, width):
    for url in (one, several):
        with opened(browser, url, viewport={"width": width, "height": 740}) as shown:
            assert shown.evaluate(OVERLAPS) == []


def test_print_is_light_fits_the_sheet_and_has_no_controls(browser, one):
    with opened(browser, one, color_scheme="dark") as shown:
        drawing = shown.locator("#map-0-plot")
        size = """plot => [plot, plot.querySelector(".main-svg")]
            .flatMap((each) => [each.clientWidth, each.clientHeight])"""
        screen = drawing.evaluate(size)
        shown.emulate_media(media="print", color_scheme="dark")
        shown.evaluate("dispatchEvent(new Event('beforeprint'))")
        white = "rgb(255, 255, 255)"
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == white
        for name in (".control", ".modebar", "nav"):
            assert not any(each.is_visible() for each in shown.locator(name).all()), name
        assert shown.evaluate(CONTRASTS)["text"] >= 4.5
        for svg in shown.locator(".plot .main-svg").all():
            box = svg.bounding_box()
            assert box["x"] + box["width"] <= shown.evaluate(
                "document.body.getBoundingClientRect().right"
            )
        assert shown.evaluate("document.body.clientWidth") <= 718  # A4 within Chromium's margins
        shown.evaluate("dispatchEvent(new Event('afterprint'))")
        shown.emulate_media(media="screen")
        shown.wait_for_timeout(500)
        assert drawing.evaluate(size) == screen
        shown.evaluate("addEventListener('beforeprint', () => (document.title = 'printed'))")
        assert shown.pdf(format="A4").startswith(b"%PDF")
        assert shown.title() == "printed"  # so that charts were drawn for the sheet


def test_charts_follow_the_width_of_the_window(browser, one):
    with opened(browser, one, viewport={"width": 1280, "height": 740}) as shown:
        drawing = shown.locator("#map-0 .main-svg").first
        wide = drawing.bounding_box()
        shown.set_viewport_size({"width": 360, "height": 740})
        shown.wait_for_timeout(1000)
        narrow = drawing.bounding_box()
        assert narrow["width"] < 360 < wide["width"]
        assert narrow["height"] == wide["height"] > 400


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
        chart.locator(".nsewdrag").first.hover(position={"x": 100, "y": 60})
        label = chart.locator(".hovertext").first
        label.wait_for()
        assert re.fullmatch(r"run\u2212?\d+(\.\d+)?", label.text_content())
        shown.mouse.move(0, 0)
        label.wait_for(state="detached")


def test_a_curve_is_read_by_its_table_too(browser, one):
    with opened(browser, one) as shown:
        summary = shown.locator("#curve-loss summary")
        summary.focus()
        assert summary.evaluate("s => getComputedStyle(s).outlineStyle") != "none"
        shown.keyboard.press("Enter")
        rows = shown.locator("#curve-loss tbody tr").all_inner_texts()
        assert rows[0].split() == ["1", "4.9"]
        assert rows[-1].split() == ["200", "-15"]
        words = shown.locator("#curve-loss .plot").get_attribute("aria-label")
        assert words.startswith("Loss: 1, 4.9; ")
        assert words.endswith("; 200, -15")


PLACE = """[document.activeElement.getBoundingClientRect().top + scrollY,
  document.activeElement.id]"""


def test_tab_reaches_everything_in_the_order_of_the_page(browser, one):
    with opened(browser, one, **PHONE) as shown:
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip-link"
        assert shown.locator(".skip-link").evaluate("s => s.getBoundingClientRect().left") >= 0
        places = []
        for _ in range(250):
            shown.keyboard.press("Tab")
            top, identity = shown.evaluate(PLACE)
            if shown.evaluate("document.activeElement === document.body"):
                break
            places.append((top, identity))
        assert "map-1-slider" in [identity for _, identity in places]
        tops = [top for top, _ in places]
        assert all(b >= a - 45 for a, b in itertools.pairwise(tops))  # a line holds several


def test_curves_can_be_logarithmic(browser, one):
    kind = "document.getElementById('curve-contrastive_top1-plot')._fullLayout.yaxis.type"
    with opened(browser, one) as shown:
        assert shown.evaluate(kind) == "linear"
        shown.get_by_label("logarithmic scale").press("Space")
        assert shown.evaluate(kind) == "log"


def test_a_finger_on_a_chart_scrolls_the_page(browser, one):
    mode = "document.getElementById('curve-loss-plot')._fullLayout.dragmode"
    with opened(browser, one, **PHONE) as shown:
        assert shown.evaluate(mode) == "zoom"
    with opened(browser, one, has_touch=True, is_mobile=True, **PHONE) as shown:
        assert shown.evaluate(mode) is False


def test_no_button_sends_a_chart_anywhere(browser, one):
    with opened(browser, one) as shown:
        buttons = shown.locator("#curve-loss .modebar-btn").evaluate_all(
            "all => all.map((each) => each.ariaLabel)"
        )
    assert buttons == ["Download plot as a PNG", "Zoom in", "Zoom out", "Reset axes"]


def test_the_legend_hides_a_run(browser, several):
    with opened(browser, several) as shown:
        lines = shown.locator("#curve-loss .scatterlayer .trace")
        assert lines.count() == 3
        shown.locator("#curve-loss .legendtoggle").nth(1).click()
        lines.nth(2).wait_for(state="detached")


def test_the_map_shows_images_to_pointer_and_keyboard(browser, one):
    place = """(n) => {
      const plot = document.getElementById("map-1-plot"), { xaxis, yaxis } = plot._fullLayout;
      const at = plot.data.flatMap((t, c) => t.customdata.map((image, p) => [image, c, p]));
      const [, curve, point] = at.find(([image]) => image === n);
      const { x, y } = plot.calcdata[curve][point];
      return [xaxis.d2p(x), yaxis.d2p(y)];
    }"""
    with opened(browser, one, **PHONE) as shown:
        figure = shown.locator("#map-1")
        thumbnail = figure.locator(".thumbnail")
        sheet = shown.locator("#sheet").get_attribute("src")
        x, y = shown.evaluate(place, 7)
        figure.locator(".nsewdrag").hover(position={"x": x, "y": y})
        thumbnail.wait_for()
        assert sheet in thumbnail.evaluate("t => t.style.backgroundImage")
        assert thumbnail.evaluate("t => t.style.backgroundPosition") == f"{-96 * 7}px 0px"
        assert "sample" in figure.locator(".hoverlayer").text_content()
        shown.keyboard.press("Escape")
        assert not thumbnail.is_visible()

        shown.mouse.move(0, 0)
        slider = shown.get_by_label("Image on the map by pretrained encoder")
        slider.focus()
        shown.keyboard.press("Home")
        for _ in range(21):
            shown.keyboard.press("ArrowRight")
        thumbnail.wait_for()
        assert thumbnail.evaluate("t => t.style.backgroundPosition") == "-96px -96px"
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_names_of_runs_are_never_run(browser, several):
    with opened(browser, several) as shown:
        assert "taken" not in shown.title()
        assert "<script>document.title" in shown.locator("#head").inner_text()


def test_without_javascript_all_numbers_and_pictures_are_there(browser, one):
    with opened(browser, one, java_script_enabled=False) as shown:
        assert shown.locator("noscript p").is_visible()
        assert not any(each.is_visible() for each in shown.locator("input").all())
        shown.locator("#curve-loss summary").click()
        assert "200" in shown.locator("#curve-loss table").inner_text()
        shown.locator("#images").click()
        assert shown.locator("#sheet").is_visible()


# --- live ---------------------------------------------------------------------------------------


def test_a_live_page_refreshes_without_losing_the_readers_place(browser, tmp_path):
    run = bare_run(tmp_path / "run")
    report = LiveReport([run], 0.2, **SMALL)
    policy = content_security_policy(live=True)
    with PageServer(0, report.page, PLOTLY, policy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        lost = "net::ERR_CONNECTION"  # the browser's own words for a server that has ended
        with opened(browser, server.url, lost, reduced_motion="reduce", **PHONE) as shown:
            shown.locator("#missing").get_by_text("gone.beton").first.wait_for()
            shown.locator("#log").check()
            summary = shown.locator("#curve-gradient_norm summary")
            summary.focus()
            shown.keyboard.press("Enter")
            summary.scroll_into_view_if_needed()
            before = summary.bounding_box()["y"]
            assert 0 < before < 740
            assert shown.evaluate("scrollY") > 500

            write_metrics(run, 40, skipped=1.0)
            shown.locator("#head").get_by_text("step 40 of 40").wait_for()
            assert shown.locator("#events li").count() == 1  # which came above the reader
            assert shown.evaluate("document.activeElement.id") == "curve-gradient_norm-numbers"
            assert shown.locator("#curve-gradient_norm details").evaluate("d => d.open")
            assert "40" in shown.locator("#curve-gradient_norm table").inner_text()
            assert shown.locator("#log").is_checked()
            last = "document.getElementById('curve-loss-plot').calcdata[0].at(-1).x"
            assert shown.evaluate(last) == 40
            assert summary.bounding_box()["y"] == pytest.approx(before, abs=3)

            server.shutdown()
            server.server_close()
            thread.join()
            shown.get_by_text("The server has ended").wait_for()
