"""The report and the viewer in headless Chromium: every control works, by keyboard too, and nothing complains.

Needs Debian's ``chromium`` and ``chromium-driver``, and ``pip install selenium``; skipped where they are not there.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_data import make_everything, make_study
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain.networks import FunctionalNetworks
from llmbrain.reporting import write_report
from llmbrain.reporting.viewer import Server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian's chromium and chromium-driver are not installed"),
]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--window-size=1400,1000",
    "--force-prefers-reduced-motion",  # scrolling that takes time makes clicks miss
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    return write_report(path, title="<script>alert(1)</script>", **make_everything()).as_uri()


@pytest.fixture
def page(browser: Any, report: str) -> Any:
    show(browser, report)
    yield browser
    assert complaints(browser) == []


def show(browser: Any, url: str) -> None:
    browser.get("about:blank")
    browser.get(url)
    until(lambda: "SD" in text_of(browser, "now") or "token" in text_of(browser, "now"))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


def until(ready: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def find(browser: Any, name: str) -> Any:
    return browser.find_element(By.ID, name)


def text_of(browser: Any, name: str) -> str:
    return find(browser, name).text


def chosen(browser: Any) -> list[str]:
    return [page.get_attribute("id") for page in browser.find_elements(By.CSS_SELECTOR, "article.chosen")]


def press(browser: Any, name: str, *keys: str) -> None:
    browser.execute_script("arguments[0].focus()", find(browser, name))
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def test_networks_are_chosen_by_every_way(page: Any) -> None:
    assert chosen(page) == ["network-0"]
    visible = [a.get_attribute("id") for a in page.find_elements(By.CSS_SELECTOR, "article") if a.is_displayed()]
    assert visible == ["network-0"]
    Select(find(page, "pick")).select_by_value("2")
    until(lambda: chosen(page) == ["network-2"])
    press(page, "next", Keys.ENTER)
    until(lambda: chosen(page) == ["network-0"])
    press(page, "previous", Keys.SPACE)
    until(lambda: chosen(page) == ["network-2"])
    page.execute_script("location.hash = '#network-1'")
    until(lambda: chosen(page) == ["network-1"])
    page.find_elements(By.CSS_SELECTOR, "#strip button")[0].click()
    until(lambda: chosen(page) == ["network-0"])
    page.find_element(By.CSS_SELECTOR, "table.networks a[href='#network-2']").click()
    until(lambda: chosen(page) == ["network-2"])


def z_in(text: str) -> tuple[int, int, float]:
    layer, neuron, z = text.replace("−", "-").replace(",", "").split(" · ")
    return int(layer.split()[1]), int(neuron.split()[1]), float(z.split()[-1])


def test_keyboard_walks_over_neurons_and_layers(page: Any) -> None:
    networks = make_study()["networks"]
    press(page, "slice", Keys.HOME)
    until(lambda: "neuron 0" in text_of(page, "readout"))
    press(page, "slice", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.PAGE_DOWN)
    layer, neuron, z = z_in(until(lambda: "layer 1" in text_of(page, "readout") and text_of(page, "readout")))
    assert (layer, neuron) == (1, 2)
    value = networks.maps[0][networks.space.index(1, 2)]
    assert z == pytest.approx(value, abs=max(0.06, 0.03 * abs(value)))
    press(page, "slice", Keys.END)
    until(lambda: "neuron 19" in text_of(page, "readout"))  # the layer of 20
    press(page, "slice", Keys.ARROW_DOWN)
    assert "neuron 19" in text_of(page, "readout")  # there is nothing below
    press(page, "layer", Keys.ARROW_RIGHT)
    until(lambda: text_of(page, "layer-value").startswith("2"))
    press(page, "floor", Keys.END)
    until(lambda: text_of(page, "floor-value") == "8.0")


def test_mouse_points_at_neurons(page: Any) -> None:
    networks = make_study()["networks"]
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = find(page, "slice")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    columns, rows = networks.space.grid
    wide, tall = canvas.size["width"], canvas.size["height"]
    x, y = (1.5 / columns - 0.5) * wide, (2.5 / rows - 0.5) * tall  # column 1, row 2; from the middle
    ActionChains(page).move_to_element_with_offset(canvas, x, y).perform()
    layer, neuron, z = z_in(until(lambda: find(page, "tip").is_displayed() and text_of(page, "tip")))
    assert (layer, neuron) == (0, 2 * columns + 1)
    value = networks.maps[0][networks.space.index(layer, neuron)]
    assert z == pytest.approx(value, abs=max(0.06, 0.03 * abs(value)))
    overview = find(page, "overview")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", overview)
    for view in ("slices", "flat"):
        page.find_element(By.CSS_SELECTOR, f"input[value={view}]").click()
        time.sleep(0.2)
        picture = page.execute_script("return arguments[0].toDataURL()", overview)
        assert len(picture) > 1500, view  # a picture, not one colour
    ActionChains(page).move_to_element_with_offset(overview, 0, overview.size["height"] / 2 - 12).click().perform()
    until(lambda: text_of(page, "layer-value").startswith("2"))


def test_text_plays_token_by_token(page: Any) -> None:
    def at() -> int:
        return int(text_of(page, "token-value").split()[0])

    Select(find(page, "speed")).select_by_visible_text("40")
    press(page, "play", Keys.ENTER)
    until(lambda: at() >= 3)
    assert text_of(page, "play") == "Pause"
    press(page, "play", Keys.ENTER)
    stopped = at()
    time.sleep(0.3)
    assert at() - stopped <= 1
    assert text_of(page, "play") == "Play"
    press(page, "text", Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    until(lambda: at() == 1)
    assert "word1" in text_of(page, "now")
    assert "condition sort" in text_of(page, "now")
    press(page, "text", Keys.END)
    until(lambda: at() == 119)
    Select(find(page, "run")).select_by_index(1)
    until(lambda: at() == 0)
    page.find_element(By.CSS_SELECTOR, "#text [data-at='30']").click()
    until(lambda: at() == 30)
    assert "condition reverse" in text_of(page, "now")
    assert page.find_element(By.CSS_SELECTOR, "#text .here").get_attribute("data-at") == "30"


def test_a_line_of_context_leads_to_its_place(page: Any) -> None:
    Select(find(page, "pick")).select_by_value("1")
    until(lambda: chosen(page) == ["network-1"])
    page.find_element(By.CSS_SELECTOR, "article.chosen .context").click()
    until(lambda: text_of(page, "token-value").startswith("60"))  # where the peak was put
    key = page.find_element(By.CSS_SELECTOR, "article.chosen [data-neuron]")
    wanted = (int(key.get_attribute("data-layer")), int(key.get_attribute("data-neuron")))
    page.execute_script("arguments[0].focus()", key)
    key.send_keys(Keys.ENTER)
    assert z_in(until(lambda: text_of(page, "readout")))[:2] == wanted


def test_movie_is_the_sum_of_maps_times_activity(page: Any) -> None:
    networks = make_study()["networks"]
    page.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", find(page, "floor"))
    find(page, "movie").click()
    press(page, "text", Keys.HOME, *[Keys.ARROW_RIGHT] * 3)
    press(page, "slice", Keys.HOME)
    text = until(lambda: "sum" in text_of(page, "readout") and text_of(page, "readout"))
    until(lambda: text_of(page, "token-value").startswith("3"))
    joined = np.concatenate(networks.time_courses)
    activity = (networks.time_courses[0][3] - joined.mean(axis=0)) / joined.std(axis=0)
    layer, neuron, shown = z_in(text)
    expected = activity @ networks.maps[:, networks.space.index(layer, neuron)]
    assert shown == pytest.approx(expected, abs=0.6)


def test_in_a_notebook_links_stay_in_the_frame(browser: Any, tmp_path: Path) -> None:
    from llmbrain.reporting import build_report

    notebook = tmp_path / "notebook.html"
    frame = build_report(title="t", **make_study())._repr_html_()
    notebook.write_text(f"<!doctype html><meta charset=utf-8><p>notebook</p>{frame}", encoding="utf-8")
    browser.get(notebook.as_uri())
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    try:
        until(lambda: "SD" in text_of(browser, "now"))
        browser.find_element(By.CSS_SELECTOR, "table.networks a[href='#network-2']").click()
        until(lambda: chosen(browser) == ["network-2"])
        browser.find_element(By.CSS_SELECTOR, "nav a[href='#methods']").click()
        time.sleep(0.2)
        assert find(browser, "methods").is_displayed()
    finally:
        browser.switch_to.default_content()
    assert complaints(browser) == []


def test_copy_gives_the_methods(page: Any) -> None:
    button = page.find_element(By.CSS_SELECTOR, "[data-copy]")
    page.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    until(lambda: page.find_element(By.CSS_SELECTOR, "[data-copied]").text)


@pytest.mark.parametrize("width", [1400, 800, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme(browser: Any, report: str, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(browser, report)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # no sideways scrolling
        colours = browser.execute_script(
            "const s = getComputedStyle(document.querySelector('main > section'));"
            "return [s.color, s.backgroundColor].map((c) => c.match(/[0-9]+/g).slice(0, 3).map(Number))"
        )
        ink, paper = (sum(colour) / 3 for colour in colours)
        assert (ink < 80 and paper > 200) if scheme == "light" else (ink > 180 and paper < 60)
        assert complaints(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_tab_reaches_every_control(page: Any) -> None:
    wanted = {"pick", "previous", "next", "floor", "layer", "slice", "run", "play", "back", "forward", "speed", "token",
              "movie", "text"}  # fmt: skip
    page.execute_script(
        "document.querySelector('#networks-title').scrollIntoView(); document.querySelector('nav a').focus()"
    )
    reached = set()
    for _ in range(90):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.switch_to.active_element.get_attribute("id"))
        if wanted <= reached:
            return
    assert wanted <= reached, wanted - reached


def test_without_scripts_everything_is_there(browser: Any, report: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report)
        assert all(article.is_displayed() for article in browser.find_elements(By.CSS_SELECTOR, "article"))
        assert "needs JavaScript" in browser.find_element(By.CSS_SELECTOR, "noscript").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("with_networks", [True, False])
def test_viewer_shows_what_was_recorded(browser: Any, tmp_path: Path, with_networks: bool) -> None:
    scans = lb.scan(tiny("llama"), tiny_tokenizer(), ["abc def ghi. " * 4], out=tmp_path / "scan")
    if with_networks:
        rng = np.random.default_rng(0)
        maps, courses = rng.standard_normal((2, scans[0].n_neurons)), rng.standard_normal((scans[0].n_tokens, 2))
        FunctionalNetworks(maps, scans[0].space, threshold=1.5, time_courses=courses).save(tmp_path / "networks")
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        show(browser, server.url)
        if with_networks:
            find(browser, "movie").click()
        press(browser, "text", Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        until(lambda: text_of(browser, "token-value").startswith("2"))
        press(browser, "slice", Keys.HOME, Keys.ARROW_RIGHT)
        until(lambda: "neuron 1" in text_of(browser, "readout") and "activation" in text_of(browser, "readout"))
        layer, neuron, shown = z_in(text_of(browser, "readout"))
        values = scans[0].data(layers=[layer], tokens=[2])[0]
        assert shown == pytest.approx(values[neuron], abs=0.006)
        assert find(browser, "pick").is_displayed() == with_networks
        assert complaints(browser) == []
    finally:
        server.shutdown()
        server.server_close()
