from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from geosurge.archive.report import RunSummary, write_report
from geosurge.archive.rows import HAS_POSITION, PROBABILITY_TOO_LOW, Row, Status
from geosurge.errors import OutputNotWritableError
from geosurge.location import Place
from geosurge.projections import equal_earth

SUMMARY = RunSummary(
    started=datetime(2026, 3, 3, 21, 4, tzinfo=UTC),
    seconds=8054.2,
    pictures_per_s=92.4,
    sources=["archive", "more.csv"],
    index_version="blue-marble-v2",
    options={"Least probability": "0.2"},
)


def done(path: str, latitude_deg: float, longitude_deg: float, radius_km: float = 50.0, country: str = "France") -> Row:
    return Row(
        path,
        Status.DONE,
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        radius_km=radius_km,
        confidence_level=0.9,
        probability=0.6,
        place=Place("Lyon", "", country, "FR", 1.0),
    )


PLACES = [(45.76, 4.84), (-18.0, 178.4), (64.1, -21.9), (-54.8, -68.3), (0.0, 0.0), (-89.0, 90.0)]
ROWS = [
    *(done(f"archive/{number}.jpg", *place, 3.0 * 4.0**number) for number, place in enumerate(PLACES)),
    *(done(f"archive/burst/{number}.jpg", 10.0, 20.0) for number in range(40)),
    Row("archive/own.jpg", Status.SKIPPED, HAS_POSITION, "the picture has a position in its EXIF"),
    Row("archive/weak.jpg", Status.WITHHELD, PROBABILITY_TOO_LOW, "0.1 is below 0.2", radius_km=900.0, probability=0.1),
    Row("archive/empty.jpg", Status.FAILED, "IMAGE_EMPTY", "the image has no bytes"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium and chromedriver are not installed")
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def show(browser: webdriver.Chrome, path: Path, theme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    browser.get(path.as_uri())


def ask(browser: webdriver.Chrome, question: str, *arguments: object) -> Any:
    return browser.execute_script(f"return {question}", *arguments)  # type: ignore[no-untyped-call]


def contrast(first: str, second: str) -> float:
    """Contrast of two colours as a browser names them. Source: WCAG 2.2, relative luminance and contrast ratio."""
    luminances = []
    for colour in (first, second):
        channels = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255.0
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(luminances) / min(luminances)


def test_the_points_are_where_the_answers_are(browser: webdriver.Chrome, tmp_path: Path) -> None:
    show(browser, write_report(ROWS, tmp_path / "report.html", summary=SUMMARY))
    box = ask(browser, "document.getElementById('world').getBoundingClientRect().toJSON()")
    points = ask(
        browser,
        """[...document.querySelectorAll('#world circle')].map((circle) => {
            const box = circle.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const title = circle.querySelector('title').textContent;
            return {x, y, width: box.width, title, fill: getComputedStyle(circle).fill};
        })""",
    )
    assert len(points) == len(PLACES) + 1
    half_width = float(equal_earth(np.array(0.0), np.array(180.0))[0])
    for number, (latitude_deg, longitude_deg) in [*enumerate(PLACES), (-1, (10.0, 20.0))]:
        x, y = equal_earth(np.array(latitude_deg), np.array(longitude_deg))
        name = "40 pictures" if number < 0 else f"archive/{number}.jpg"
        (point,) = [point for point in points if point["title"].startswith(name)]
        scale = box["width"] / 2.0 / half_width
        assert point["x"] == pytest.approx(box["x"] + box["width"] / 2.0 + scale * float(x), abs=1.0)
        assert point["y"] == pytest.approx(box["y"] + box["height"] / 2.0 - scale * float(y), abs=1.0)
    # Six radii of six classes have six colours, and many pictures a larger dot than one.
    assert len({point["fill"] for point in points}) == 6
    widths = {point["title"].split("\n")[0]: point["width"] for point in points}
    assert widths["40 pictures"] > 1.2 * widths["archive/0.jpg"] > 4.0
    assert browser.get_log("browser") == []


def test_the_page_fetches_nothing_and_tells_the_numbers(browser: webdriver.Chrome, tmp_path: Path) -> None:
    show(browser, write_report(ROWS, tmp_path / "report.html", summary=SUMMARY))
    assert ask(browser, "performance.getEntriesByType('resource').length") == 0
    assert ask(browser, "document.querySelector('h1').innerText") == "46 of 49 pictures located"
    cells = ask(
        browser,
        """Object.fromEntries([...document.querySelectorAll('[aria-labelledby=outcome] tbody tr')].map(
            (row) => [row.cells[0].innerText, row.cells[2].innerText]))""",
    )
    assert cells == {"done": "46", "skipped": "1", "withheld": "1", "failed": "1", "found": "49"}
    text = ask(browser, "document.body.innerText")
    for fact in ("2 h 14 min", "92.4 pictures a second", "blue-marble-v2", "3 March 2026, 21:04 UTC", "more.csv"):
        assert fact in text
    for fact in ("IMAGE_EMPTY", "the image has no bytes", "archive/empty.jpg", HAS_POSITION, "0.1 is below 0.2"):
        assert fact in text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_can_be_told_apart_in_both_themes(browser: webdriver.Chrome, tmp_path: Path, theme: str) -> None:
    show(browser, write_report(ROWS, tmp_path / "report.html", summary=SUMMARY), theme)
    colours = ask(
        browser,
        """({
            page: getComputedStyle(document.body).backgroundColor,
            text: [...document.querySelectorAll('h1, p, th, td, .detail, dt, dd, figcaption')]
                .map((element) => getComputedStyle(element).color),
            land: getComputedStyle(document.querySelector('.land')).fill,
            sea: getComputedStyle(document.querySelector('.sea')).fill,
            dots: [...document.querySelectorAll('#world circle')].map((circle) => getComputedStyle(circle).fill),
            swatches: [...document.querySelectorAll('.swatch, .parts span, .bar span')]
                .map((element) => getComputedStyle(element).backgroundColor),
        })""",
    )
    page = contrast(colours["page"], "rgb(255, 255, 255)")
    assert page == pytest.approx(1.0) if theme == "light" else page > 10.0
    assert min(contrast(colour, colours["page"]) for colour in colours["text"]) >= 4.5
    assert min(contrast(colour, colours["page"]) for colour in colours["swatches"]) >= 3.0
    for ground in ("land", "sea"):
        assert min(contrast(colour, colours[ground]) for colour in colours["dots"]) >= 3.0


def test_tables_and_the_map_say_what_they_are(browser: webdriver.Chrome, tmp_path: Path) -> None:
    show(browser, write_report(ROWS, tmp_path / "report.html", summary=SUMMARY))
    assert ask(browser, "document.documentElement.lang") == "en"
    assert ask(browser, "document.querySelectorAll('table').length") == 5
    assert ask(
        browser,
        """[...document.querySelectorAll('table')].every((table) =>
            table.querySelectorAll('thead th[scope=col]').length >= 3
            && [...table.querySelectorAll('thead th')].every((heading) => heading.innerText)
            && table.querySelectorAll('tbody th[scope=row]').length >= 1)""",
    )
    label = ask(browser, "document.querySelector('svg[role=img]').getAttribute('aria-label')")
    assert "46 pictures at 7 places" in label
    assert ask(browser, "[...document.querySelectorAll('button')].every((button) => button.ariaLabel)")


def test_one_can_look_closer_at_the_map(browser: webdriver.Chrome, tmp_path: Path) -> None:
    show(browser, write_report(ROWS, tmp_path / "report.html", summary=SUMMARY))
    world = browser.find_element("id", "world")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", world)  # type: ignore[no-untyped-call]

    def view() -> list[float]:
        return [float(part) for part in str(world.get_dom_attribute("viewBox")).split()]

    def dot_width() -> float:
        return float(ask(browser, "document.querySelector('#world circle').getBoundingClientRect().width"))

    whole, width = view(), dot_width()
    for _ in range(2):
        browser.find_element("css selector", "[data-zoom=in]").click()
    assert view() == [whole[2] * 3 / 8, whole[3] * 3 / 8, whole[2] / 4, whole[3] / 4]
    assert dot_width() == pytest.approx(width, rel=0.05)
    ActionChains(browser).drag_and_drop_by_offset(world, 100, 50).perform()
    left, top, *size = view()
    assert left < whole[2] * 3 / 8
    assert top < whole[3] * 3 / 8
    assert size == [whole[2] / 4, whole[3] / 4]
    world.send_keys(Keys.ARROW_RIGHT)
    assert view()[0] > left
    world.send_keys("-")
    assert view()[2] == whole[2] / 2
    for _ in range(10):
        ActionChains(browser).double_click(world).perform()
    assert view()[2] == whole[2] / 64
    browser.find_element("css selector", "[data-zoom=all]").click()
    assert view() == whole
    assert browser.get_log("browser") == []


def test_names_of_files_and_places_are_text_whatever_they_hold(browser: webdriver.Chrome, tmp_path: Path) -> None:
    attack = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>$title ${style}.jpg"
    rows = [
        done(attack, 1.0, 2.0, country=attack),
        Row(attack, Status.FAILED, attack, attack),
        Row("turned \u202egpj.exe\n\x07", Status.FAILED, "IMAGE_EMPTY", "the image has no bytes"),
    ]
    summary = RunSummary(SUMMARY.started, 0.5, 1.0, [attack], attack, {attack: attack})
    show(browser, write_report(rows, tmp_path / "report.html", summary=summary))
    assert ask(browser, "[document.scripts.length, document.images.length]") == [1, 0]
    text = ask(browser, "document.body.innerText")
    # Country, name, reason, detail, source, index (twice), and an option with its value.
    assert text.count(attack) == 9
    assert attack in ask(browser, "document.querySelector('#world circle title').textContent")
    assert "turned \\u202egpj.exe\\u000a\\u0007" in text
    assert browser.get_log("browser") == []


def test_no_script_but_the_page_s_own_would_run(browser: webdriver.Chrome, tmp_path: Path) -> None:
    path = write_report(ROWS, tmp_path / "report.html", summary=SUMMARY)
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")
    show(browser, path)
    assert browser.title == "46 of 49 pictures located"
    (refused,) = browser.get_log("browser")
    assert "Content Security Policy" in refused["message"]


def test_a_page_of_many_answers_stays_small(tmp_path: Path) -> None:
    places = random.Random(5)
    rows = (
        done(f"{'long/' * 40}{number}.jpg", places.uniform(-60.0, 70.0), places.uniform(-180.0, 180.0))
        for number in range(20_000)
    )
    path = write_report(rows, tmp_path / "report.html", summary=SUMMARY)
    page = path.read_text(encoding="utf-8")
    assert 1_000 <= page.count("<circle") <= 5_000
    assert path.stat().st_size < 2_000_000
    counts = re.findall(r"<title>([\d,]+) pictures", page)
    alone = page.count("<circle") - len(counts)
    assert alone + sum(int(count.replace(",", "")) for count in counts) == 20_000


@pytest.mark.parametrize("rows", [[], ROWS[-3:], ROWS[:1]])
def test_runs_of_few_pictures_have_pages_too(browser: webdriver.Chrome, tmp_path: Path, rows: list[Row]) -> None:
    show(browser, write_report(rows, tmp_path / "new" / "report.html", summary=SUMMARY))
    located = sum(row.status is Status.DONE for row in rows)
    assert ask(browser, "document.querySelectorAll('#world circle').length") == located
    assert ask(browser, "document.body.innerText.includes('No picture was located.')") == (not located)
    assert browser.get_log("browser") == []


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    first = write_report(ROWS, tmp_path / "a.html", summary=SUMMARY)
    assert first.read_bytes() == write_report(iter(ROWS), tmp_path / "b.html", summary=SUMMARY).read_bytes()


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotWritableError, match=r"cannot write .*file/report\.html"):
        write_report(ROWS, tmp_path / "file" / "report.html", summary=SUMMARY)
