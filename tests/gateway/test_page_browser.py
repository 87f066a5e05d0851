"""The page in a real Chromium, in front of a gateway and emulated engines: what a person would see."""

import json
import os
import shutil

import pytest
from stage import chromium, stage

from headway.core.events import Role
from headway.hosts.emulator.faults import Fault
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts

for tool, variable in (("chromium", "CHROMIUM"), ("chromedriver", "CHROMEDRIVER")):
    if shutil.which(os.environ.get(variable, f"/usr/bin/{tool}")) is None:
        pytest.skip(f"needs {tool} (Debian: chromium, chromium-driver)", allow_module_level=True)
pytest.importorskip("selenium", reason="needs selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

#: 60 ms a pass and more: lanes with passes wide enough to see.
COSTS = DenseCosts(0.060, 0, 0.0001, 0.0001, 0.0, 0.0)


def pool(role, instances):
    return PoolSpec(
        role=role,
        instances=instances,
        ranks=4,
        token_cap=512,
        max_running=64,
        kv_blocks=2000,
        block_tokens=16,
        costs=COSTS,
    )


CLUSTER = ClusterSpec(
    name="tiny",
    kv_bytes_per_token=1000,
    network=NetworkSpec(),
    pools=(pool(Role.PREFILL, 2), pool(Role.DECODE, 1)),
)


@pytest.fixture(scope="module")
def played():
    with stage(CLUSTER) as scene:
        scene.prompt_bytes, scene.output_tokens = (400, 4000), (2, 6)
        scene.load(15.0)
        yield scene


@pytest.fixture(scope="module")
def browser(played, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(played.gateway.page_url)
        yield driver


def soon(driver, condition, what):
    return WebDriverWait(driver, 8.0, 0.05).until(lambda _: condition(), what)


def texts(driver, selector):
    """Of all elements at one moment: rows are made anew with every telling."""
    return script(
        driver, "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
    )


def text(driver, selector):
    return next(iter(texts(driver, selector)), "")


def script(driver, code, *args):
    return driver.execute_script(code, *args)


def press(driver, *keys):
    ActionChains(driver).send_keys(*keys).perform()


def unfocus(driver):
    script(driver, "document.activeElement.blur()")


def media(driver, **features):
    found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": found})


def brightness(colour):
    """Of `rgb(…)`, 0 to 1."""
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 765


PAINTED = """
const canvas = document.querySelector(`[data-lane="${arguments[0]}"] canvas`);
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const seen = new Set();
for (let at = 0; at < data.length; at += 4) seen.add(data.slice(at, at + 3).join());
return [...seen].length
"""


def test_lanes_of_passes_appear_for_every_instance(browser):
    for name in ("prefill-0", "prefill-1", "decode-0"):
        lane = f'[data-lane="{name}"]'
        soon(browser, lambda lane=lane: browser.find_elements(By.CSS_SELECTOR, lane), f"a lane of {name}")
        element = browser.find_element(By.CSS_SELECTOR, lane)
        soon(browser, lambda e=element: int(e.get_attribute("data-passes")) > 3, f"passes of {name}")
        soon(browser, lambda n=name: script(browser, PAINTED, n) >= 3, f"colours of {name}")
        label = element.find_element(By.TAG_NAME, "canvas").get_attribute("aria-label")
        assert "4 ranks" in label and "passes" in label


def test_percentiles_and_utilisation_are_numbers(browser):
    soon(browser, lambda: "within target" in text(browser, "#ttft"), "a first token")
    soon(browser, lambda: "within target" in text(browser, "#tpot"), "a token time")
    values = texts(browser, "#ttft dd")
    assert len(values) == 3 and all(value.endswith("s") for value in values)
    soon(browser, lambda: text(browser, "#chunk-all").endswith("%"), "the utilisation")
    assert text(browser, "#policy") == "staggered" and text(browser, "#status") == "live"


def test_decisions_appear_and_can_be_filtered(browser):
    rows = "#decision-rows tr"
    soon(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, rows)) > 3, "decisions")
    assert "Dispatch" in text(browser, rows)
    kind = Select(browser.find_element(By.ID, "kind"))
    kind.select_by_visible_text("Reject")
    soon(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, f"{rows}[data-do=Dispatch]"), "a filter")
    kind.select_by_visible_text("all")
    soon(browser, lambda: "Dispatch" in text(browser, rows), "decisions of every kind")


def test_held_requests_are_shown_with_their_reasons(played, browser):
    for name in ("prefill-0", "prefill-1"):
        played.do(played.gateway.workers.drain, name)
    try:
        soon(browser, lambda: int(text(browser, "#held-requests")) > 2, "held requests")
        reason = text(browser, "#reasons li").lstrip("0123456789 ").strip()
        assert reason in ("no engine takes work", "no slot is open")
        soon(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#held-rows tr")) > 2, "held rows")
        assert int(text(browser, "#held-requests")) > 2
        soon(browser, lambda: "draining" in text(browser, "#worker-rows"), "the worker's state")
        assert "not ready" in text(browser, "#workers-note")
    finally:
        for name in ("prefill-0", "prefill-1"):
            played.do(played.gateway.workers.undrain, name)
    soon(browser, lambda: "3 of 3" in text(browser, "#workers-note"), "the workers' return")
    soon(browser, lambda: "nothing is held" in text(browser, "#reasons"), "an empty buffer")


def test_a_worker_that_goes_down_turns_red_and_says_so(played, browser):
    row = '#worker-rows tr[data-worker="prefill-1"]'
    soon(browser, lambda: text(browser, f"{row} .state") == "up", "up")
    played.fault("prefill-1", Fault("refuse"))
    try:
        is_down = (
            "tr[data-health=down][data-worker=prefill-1], tr[data-health=ejected][data-worker=prefill-1]"
        )
        soon(browser, lambda: browser.find_elements(By.CSS_SELECTOR, is_down), "a worker that is down")
        state = f"const s = document.querySelector('{row} .state')"
        red, words = script(browser, f"{state}; return [getComputedStyle(s).color, s.textContent]")
        assert red == "rgb(179, 38, 30)" and words in ("down", "ejected")
        soon(
            browser,
            lambda: (
                script(browser, "return document.querySelector('[data-lane=prefill-1]').dataset.health")
                != "up"
            ),
            "its lane",
        )
    finally:
        played.fault("prefill-1", None)
    soon(browser, lambda: text(browser, f"{row} .state") == "up", "its return")


def test_space_pauses_what_is_shown_and_resumes_it(played, browser):
    unfocus(browser)
    press(browser, Keys.SPACE)
    soon(browser, lambda: text(browser, "#status") == "paused", "a pause")
    button = browser.find_element(By.ID, "pause")
    assert button.get_attribute("aria-pressed") == "true" and button.text.startswith("Resume")
    newest = text(browser, "#decision-rows tr")
    decided = len(played.statuses)
    soon(browser, lambda: len(played.statuses) > decided + 8, "requests meanwhile")
    assert text(browser, "#decision-rows tr") == newest
    press(browser, Keys.SPACE)
    soon(browser, lambda: text(browser, "#status") == "live", "the end of the pause")
    soon(browser, lambda: text(browser, "#decision-rows tr") != newest, "news")


def test_the_keyboard_reaches_everything_and_everything_has_a_name(browser):
    script(browser, "document.querySelector('.skip').focus()")
    reached = []
    while (at := browser.switch_to.active_element).tag_name != "body" and len(reached) < 12:
        assert at.accessible_name, at.get_attribute("outerHTML")[:200]
        reached.append(at.get_attribute("id") or at.tag_name)
        press(browser, Keys.TAB)
    lanes = ["canvas"] * 3
    panels = ["div", "summary", "div", "kind", "summary", "div"]
    assert reached == ["a", "pause", *lanes, *panels], reached


def test_arrow_keys_walk_from_pass_to_pass(browser):
    lane = browser.find_element(By.CSS_SELECTOR, '[data-lane="prefill-0"] canvas')
    soon(browser, lambda: "passes" in lane.get_attribute("aria-label"), "passes")
    unfocus(browser)
    press(browser, Keys.SPACE)
    script(browser, "arguments[0].focus()", lane)
    assert "prefill-0 rank 0" in text(browser, "#probe") and "512 prompt tokens" in text(browser, "#probe")
    newest = text(browser, "#probe")
    lane.send_keys(Keys.ARROW_LEFT)
    assert text(browser, "#probe") != newest
    lane.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert "prefill-0 rank 2" in text(browser, "#probe")
    unfocus(browser)
    press(browser, Keys.SPACE)
    soon(browser, lambda: text(browser, "#status") == "live", "the end of the pause")


def test_it_is_dark_where_dark_is_wanted(browser):
    shades = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    ground, ink = map(brightness, script(browser, shades))
    assert ground > 0.9 and ink < 0.2
    media(browser, prefers_color_scheme="dark")
    try:
        ground, ink = map(brightness, script(browser, shades))
        assert ground < 0.1 and ink > 0.85
    finally:
        media(browser, prefers_color_scheme="light")


@pytest.mark.parametrize("width", [1300, 500])
def test_it_fits_the_width(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert script(browser, "return document.documentElement.scrollWidth <= innerWidth")
        sizes = "return [...document.querySelectorAll('main *')].filter(e => e.offsetParent && e.textContent)"
        assert min(script(browser, f"{sizes}.map(e => parseFloat(getComputedStyle(e).fontSize))")) >= 11
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_bar_of_the_chunk_utilisation_is_cut_off(browser):
    soon(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#chunk-bars li")) == 2, "bars")
    fit = """
    const list = document.querySelector("#chunk-bars");
    for (const bar of [...list.children, ...list.children]) list.append(bar.cloneNode(true));
    return [list.children.length, list.scrollHeight <= list.clientHeight];
    """
    assert script(browser, fit) == [6, True]


def test_a_list_of_bars_that_scrolls_can_be_reached_by_keyboard(browser):
    scroll = """
    const list = document.createElement("ul");
    list.style = "height: 10px; overflow: auto";
    list.innerHTML = arguments[0];
    document.body.append(list);
    reachIfItScrolls(list, "Bars");
    const found = [list.tabIndex, list.getAttribute("aria-label")];
    list.remove();
    return found;
    """
    assert script(browser, scroll, "<li>1<li>2<li>3") == [0, "Bars"]
    assert script(browser, scroll, "") == [-1, None]


def test_a_lane_of_many_ranks_names_some_of_them_and_stays_on_the_screen(browser):
    assert script(browser, "return rankTicks(4)") == []
    for ranks in (9, 32, 320, 1024):
        ticks, row = script(browser, "return [rankTicks(arguments[0]), laneHeight(arguments[0])]", ranks)
        assert ticks[0] == 0 and ticks[-1] == ranks - 1 and ticks == sorted(set(ticks))
        assert row >= 1 and (ranks > 320 or ranks * row <= 320)


def test_the_words_of_decisions_and_states_are_explained(browser):
    for panel, words in (
        ("decisions", {"Dispatch", "idle", "slot", "saturated", "round", "Reject", "Recall"}),
        ("workers", {"starting", "up", "draining", "ejected", "down"}),
    ):
        summary = browser.find_element(By.CSS_SELECTOR, f"#{panel} summary")
        summary.click()
        assert words <= set(texts(browser, f"#{panel} .words dt"))
        assert browser.find_element(By.CSS_SELECTOR, f"#{panel} .words dd").is_displayed()
        summary.click()


def test_nothing_is_fetched_from_elsewhere_and_the_console_is_clean(played, browser):
    soon(browser, lambda: text(browser, "#status") == "live", "life")
    base = played.gateway.url
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"
    }
    # The other ones are of the tab that the browser opens before ours.
    assert {
        url for url in urls if not url.startswith((base, "data:", "chrome://", "chrome-untrusted://"))
    } == set()
    assert f"{base}/admin/live" in urls
    assert browser.get_log("browser") == []


def test_a_token_is_asked_for_and_a_link_can_bring_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OPERATORS", "open sesame")
    with stage(CLUSTER, admin={"port": 0, "token_env": "OPERATORS"}) as scene, chromium(tmp_path) as driver:
        driver.get(scene.gateway.page_url)
        soon(driver, lambda: driver.find_element(By.ID, "token").is_displayed(), "the question")
        assert text(driver, "#status") == "connecting"
        driver.find_element(By.ID, "token").send_keys("wrong", Keys.ENTER)
        soon(driver, lambda: "not the gateway's" in text(driver, "#token-note"), "a no")
        driver.find_element(By.ID, "token").send_keys("open sesame", Keys.ENTER)
        soon(driver, lambda: text(driver, "#status") == "live", "the data")
        driver.switch_to.new_window("tab")
        driver.get(f"{scene.gateway.page_url}#token=open%20sesame")
        soon(driver, lambda: text(driver, "#status") == "live", "the data, by link")
        assert "sesame" not in driver.current_url


def test_it_says_when_the_gateway_is_gone(tmp_path):
    with chromium(tmp_path) as driver:
        with stage(CLUSTER) as scene:
            driver.get(scene.gateway.page_url)
            soon(driver, lambda: text(driver, "#status") == "live", "life")
        soon(driver, lambda: text(driver, "#status") not in ("live", "connecting"), "the end")
        assert driver.find_element(By.ID, "status").get_attribute("data-state") == "lost"
