"""The report's page in a real browser; skipped without one, unless MOEPRUNE_REQUIRE_BROWSER=1 says it must be there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeprune.report.documents.html.page import html_page

try:
    from selenium.webdriver import ActionChains, Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    Chrome = None

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def browser() -> Iterator["Chrome"]:
    found = {"selenium": Chrome, **{name: shutil.which(name) for name in ("chromium", "chromedriver")}}
    if missing := [name for name, place in found.items() if place is None]:
        reason = f"the page can only be tried in a browser with {', '.join(missing)}"
        if os.environ.get("MOEPRUNE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*"]})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(document, report_folder: Path) -> str:
    path = report_folder / "report.html"
    path.write_text(html_page(document, report_folder), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser, address) -> "Chrome":
    """The page anew, at a desk and in light colours."""
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    prefer(browser, "light")
    browser.get(address)
    browser.execute_script("try { localStorage.clear() } catch {} delete document.documentElement.dataset.theme")
    return browser


def prefer(browser, scheme: str) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def as_telephone(browser, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def first_column(page) -> list[str]:
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "tbody tr > :first-child")]


def head(page, place: int):
    return page.find_elements(By.CSS_SELECTOR, "thead tr:last-child th")[place]


def settled(page, script: str):
    """The value of a script after the two frames in which the page draws what was asked."""
    return page.execute_async_script(
        f"const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done({script})))"
    )


def scale(page, number: int = 0) -> float:
    return settled(page, f"new DOMMatrix(document.querySelectorAll('.frame svg')[{number}].style.transform).a")


def test_it_loads_without_network_errors_or_violations(page):
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert page.get_log("browser") == []
    assert page.title == "A report & its <title>"  # and not harmed
    assert "harmed" in page.find_element(By.CSS_SELECTOR, "main > p").text  # as text


def test_an_injected_script_would_not_run(page):
    page.execute_script(
        "const script = document.createElement('script'); script.textContent = 'document.title = 1';"
        "document.body.append(script);"
    )
    assert page.title == "A report & its <title>"
    assert "Content Security Policy" in page.get_log("browser")[0]["message"]


def test_a_click_sorts_by_number_and_missing_cells_stay_last(page):
    button = head(page, 1).find_element(By.TAG_NAME, "button")
    button.click()
    assert first_column(page) == ["moe_slimming", "reap", "frequency"]
    assert head(page, 1).get_attribute("aria-sort") == "ascending"
    button.click()
    assert first_column(page) == ["reap", "moe_slimming", "frequency"]
    assert head(page, 1).get_attribute("aria-sort") == "descending"
    button.click()
    assert first_column(page) == ["reap", "moe_slimming", "frequency"]  # as it was
    assert head(page, 1).get_attribute("aria-sort") is None


def test_the_keyboard_sorts_names_too(page):
    head(page, 0).find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert first_column(page) == ["frequency", "moe_slimming", "reap"]
    assert head(page, 0).get_attribute("aria-sort") == "ascending"


def test_light_and_dark_by_system_and_by_switch(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = settled(page, background)
    prefer(page, "dark")
    dark = settled(page, background)
    assert dark != light
    assert "invert" in settled(page, "getComputedStyle(document.querySelector('.frame')).filter")
    switch = page.find_element(By.CSS_SELECTOR, ".theme")
    assert switch.text == "Light"
    switch.click()
    assert settled(page, background) == light and switch.text == "Dark"
    assert settled(page, "getComputedStyle(document.querySelector('.frame')).filter") == "none"


def test_a_note_opens_by_click_key_and_mouse_inside_the_window(page):
    button = page.find_element(By.CSS_SELECTOR, "td .note[aria-describedby]")
    note = page.find_element(By.ID, button.get_attribute("popovertarget"))
    assert not note.is_displayed()
    button.click()
    assert note.is_displayed() and "BudgetError" in note.text
    assert page.execute_script(
        "const box = arguments[0].getBoundingClientRect();"
        "return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight", note
    )  # fmt: skip
    button.send_keys(Keys.ESCAPE)
    assert not note.is_displayed()
    button.send_keys(Keys.ENTER)
    assert note.is_displayed()
    button.send_keys(Keys.ESCAPE)
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).move_to_element(button).perform()
    assert note.is_displayed()


def test_runs_behind_a_row_are_links(page):
    row = page.find_elements(By.CSS_SELECTOR, "tbody tr")[0]
    row.find_element(By.CSS_SELECTOR, ".runs button").click()
    links = [link for link in row.find_elements(By.CSS_SELECTOR, ".runs a") if link.is_displayed()]
    assert [link.text for link in links] == ["sweep/0", "sweep/1"]
    assert links[0].get_attribute("href").endswith("/sweep/0")


def test_buttons_and_keys_zoom_one_figure(page):
    page.find_elements(By.CSS_SELECTOR, "[data-zoom=in]")[0].click()
    zoomed = scale(page)
    assert zoomed > 1.2 and scale(page, 1) == 1
    frame = page.find_elements(By.CSS_SELECTOR, ".frame")[0]
    frame.send_keys("+")
    assert scale(page) > zoomed
    before = settled(page, "document.querySelector('.frame svg').style.transform")
    frame.send_keys(Keys.ARROW_LEFT)
    assert settled(page, "document.querySelector('.frame svg').style.transform") != before
    frame.send_keys("0")
    assert scale(page) == 1


def test_the_wheel_scrolls_the_page_until_the_figure_has_the_focus(page):
    frame = page.find_elements(By.CSS_SELECTOR, ".frame")[0]
    wheel = (
        "arguments[0].dispatchEvent("
        "new WheelEvent('wheel', {deltaY: -100, ctrlKey: arguments[1], bubbles: true, cancelable: true}))"
    )
    page.execute_script(wheel, frame, False)
    assert scale(page) == 1
    page.execute_script(wheel, frame, True)
    assert scale(page) > 1
    frame.send_keys("0")
    page.execute_script(wheel, frame, False)  # it has the focus now
    assert scale(page) > 1


def test_two_fingers_zoom(page):
    as_telephone(page, 390)
    frame = page.find_elements(By.CSS_SELECTOR, ".frame")[0]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    box = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", frame)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, reach: float) -> None:
        points = [{"x": x - reach, "y": y, "id": 0}, {"x": x + reach, "y": y, "id": 1}] if reach else []
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 20)
    for reach in (40, 60, 80):
        touch("touchMove", reach)
    touch("touchEnd", 0)
    assert scale(page) > 1.1


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_telephone_only_the_tables_scroll_sideways(page, width):
    as_telephone(page, width)
    page.refresh()
    widths = settled(page, "[document.documentElement.scrollWidth, innerWidth]")
    assert widths == [width, width]
    assert settled(page, "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")
    page.execute_script("document.querySelector('.scroll').scrollLeft = 300")
    first = page.find_element(By.CSS_SELECTOR, "tbody tr > :first-child")
    left = page.execute_script("return arguments[0].getBoundingClientRect().left", first)
    assert 0 <= left < 40  # it stays in sight


def test_marks_beyond_the_edge_of_a_table_do_not_widen_the_page(page):
    """Words that only a screen reader meets stand beside best values, out of the flow."""
    page.execute_script(
        "const cell = document.querySelector('tbody tr').lastElementChild;"
        "cell.style.paddingLeft = '3000px'; cell.insertAdjacentHTML('beforeend', '<span class=\"unseen\">best</span>')"
    )
    wide, shown = settled(page, "[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide == shown


def test_paper_shows_light_figures_and_the_notes_in_full(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    note = page.find_element(By.CSS_SELECTOR, ".notes .pop")
    assert note.is_displayed() and note.text.startswith("1")
    assert not page.find_element(By.TAG_NAME, "nav").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
