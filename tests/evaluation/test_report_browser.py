"""report.html in a real browser: its script, and that foreign text does not run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_html import HOSTILE, example_results, example_samples, write
from wording import Like

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed (Debian: chromium-driver)"),
]

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
    "--force-prefers-reduced-motion",  # else a click may come before the page has scrolled
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder)
    return folder / "report.html"


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    browser.get(report.as_uri())
    return browser


def choose(page: Any, name: str, value: str) -> None:
    page.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true }))",
        name,
        value,
    )


def rows(page: Any) -> list[str]:
    """Set and number of the rows that are shown, in order."""
    found = page.execute_script(
        "return [...document.querySelectorAll('#rows tbody th')].map(th => th.childNodes[0].data ?? "
        "th.childNodes[0].textContent + th.childNodes[1].data)"
    )
    return [str(row) for row in found]


def test_nothing_is_wrong_and_nothing_is_loaded(page: Any) -> None:
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource')") == []
    # The policy is in force: a script that is not the page's own is refused.
    ran = page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "s.remove(); return window.ran ?? null"
    )
    assert ran is None
    assert "Content Security Policy" in page.get_log("browser")[0]["message"]


def test_hostile_text_does_not_run(browser: Any, tmp_path: Path) -> None:
    sample = example_samples()[0]
    answers = {name: answer.model_copy(update={"text": HOSTILE}) for name, answer in sample.answers.items()}
    hostile = sample.model_copy(
        update={
            "prompt": HOSTILE,
            "expected": HOSTILE,
            "place": HOSTILE,
            "answers": answers | {"base": sample.answers["base"]},
        }
    )
    write(tmp_path, samples=[hostile], results=example_results(name="hostile", remarks=(HOSTILE,)))
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.title == Like("hostile: … 2 of 4")  # selenium raises where an alert is open
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('img, script:not(#data)').length") == 1
    shown = browser.execute_script("return document.querySelector('#rows td:nth-of-type(1) .text').textContent")
    assert shown == HOSTILE.replace("\x00", "NUL").replace("\x1b", "ESC").replace("\u202e", "U+202E").replace(
        "\u2028", "U+2028"
    )
    assert browser.execute_script("return document.querySelectorAll('#rows .control').length") >= 4


def test_search_and_set(page: Any) -> None:
    assert len(rows(page)) == 50
    choose(page, "filter-text", "THE MIXER AFTER ALL")
    assert rows(page) == [f"heldout {row}" for row in range(1, 60, 4)]
    assert page.find_element("id", "shown").text == Like("… 1 … 15 … 15 … 63")
    choose(page, "filter-text", "")
    choose(page, "filter-set", "chat")
    assert rows(page) == ["chat 0", "chat 1", "chat 2"]
    choose(page, "filter-text", "there is no such text")
    assert rows(page) == []
    assert page.find_element("id", "shown").text == Like("No row")


def test_rows_by_what_the_models_made_of_them(page: Any) -> None:
    choose(page, "filter-kind", "differ")
    assert "heldout 0" in rows(page)
    choose(page, "filter-set", "chat")
    assert rows(page) == []  # all models answer alike
    choose(page, "filter-set", "heldout")
    choose(page, "filter-kind", "wins")
    assert len(rows(page)) == 50
    assert "heldout 3" not in rows(page)  # the adapter is wrong there too
    choose(page, "filter-kind", "losses")
    assert rows(page) == []
    choose(page, "filter-metric", "loss")  # lower is better
    choose(page, "filter-kind", "wins")
    assert "heldout 3" in rows(page)
    choose(page, "filter-kind", "unended")
    assert rows(page) == [f"heldout {row}" for row in range(0, 60, 3)]


def test_order_and_pages(page: Any) -> None:
    page.find_element("id", "page-next").click()
    assert rows(page)[0] == "heldout 50"
    assert page.find_element("id", "page-at").text == "Page 2 of 2"
    assert not page.find_element("id", "page-next").is_enabled()
    heading = page.find_element("css selector", "#rows [data-model=adapter]")
    heading.find_element("tag name", "button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert rows(page)[:3] == ["heldout 3", "heldout 23", "heldout 43"]  # its wrong answers first
    heading.find_element("tag name", "button").send_keys("\n")
    assert heading.get_attribute("aria-sort") == "descending"
    assert rows(page)[0] == "heldout 0"


def test_differences_from_the_expected_answer_are_marked(page: Any) -> None:
    choose(page, "filter-text", "the plug is warm")
    cell = "#rows tbody tr:first-child td[data-label=adapter]"
    marks = page.execute_script(
        f"return [...document.querySelectorAll('{cell} :is(ins, del)')].map(m => [m.tagName, m.textContent])"
    )
    assert marks == [["DEL", "defect"], ["INS", "delivery"], ["DEL", "low"], ["INS", "high"]]
    page.find_element("id", "filter-marks").click()
    assert page.find_elements("css selector", "#rows ins, #rows del") == []


def test_long_texts_are_shown_when_asked_for(page: Any) -> None:
    choose(page, "filter-set", "chat")
    cell = page.find_element("css selector", "#rows tbody tr:nth-child(3) td")
    assert len(cell.text) < 700
    button = cell.find_element("css selector", "button.more")
    assert button.text == "show all (1,500 characters)"
    button.click()
    assert cell.text.count("word") == 300
    assert button.get_attribute("aria-expanded") == "true"


def test_right_to_left_text_stands_alone(page: Any) -> None:
    choose(page, "filter-set", "chat")
    directions = page.execute_script(
        "return [...document.querySelectorAll('#rows td:nth-of-type(1) .text')].map(e => getComputedStyle(e).direction)"
    )
    assert directions == ["rtl", "ltr", "ltr"]


@pytest.mark.parametrize("width", [320, 360, 390, 768, 900, 1024])
def test_a_narrow_window_shows_tables_whole(page: Any, width: int) -> None:
    """Neither the page nor a table scrolls sideways, and each figure has its model's name beside it or above it."""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
        beyond = page.execute_script(
            "const wide = one => one.scrollWidth > one.clientWidth;"
            "return [document.documentElement, ...document.querySelectorAll('.scroll:has(table)')].filter(wide)"
            ".map(one => one.getAttribute('aria-label') ?? 'the page')"
        )
        assert beyond == []
        named = page.execute_script(
            "return [...document.querySelectorAll('.figures')].map(table => {"
            "const head = getComputedStyle(table.tHead).position !== 'absolute';"
            "return [...table.tBodies[0].rows[0].cells].slice(1).every(cell => head ||"
            "getComputedStyle(cell, '::before').content === JSON.stringify(cell.dataset.label)) })"
        )
        assert named
        assert all(named)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_javascript_the_first_rows_are_there(page: Any, report: Path) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(report.as_uri())
        assert len(page.find_elements("css selector", "#rows tbody tr")) == 50
        assert page.find_element("css selector", "noscript p").is_displayed()
        assert not page.find_element("id", "filters").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
