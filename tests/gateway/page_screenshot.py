"""Takes the picture of the page that the documentation shows.

python tests/gateway/page_screenshot.py docs/images/page.png [light|dark] [WIDTH]
"""

import base64
import sys
import tempfile
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from stage import chromium, stage

#: Slow enough for a machine that has other things to do; the lanes are as full as at full speed.
SPEED, RPS, ROWS = 0.5, 13.0, 250


def shoot(path, scheme, width):
    with (
        stage("dsv3-h200-pd", speed=SPEED, slo={"ttft_s": 4.0, "tpot_s": 0.1}) as scene,
        tempfile.TemporaryDirectory() as profile,
        chromium(profile, width=width, height=3000) as browser,
    ):
        scene.prompt_bytes, scene.output_tokens = (4_000, 40_000), (20, 120)
        scene.load(RPS)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        browser.get(scene.gateway.page_url)
        rows = browser.find_element(By.ID, "served")
        WebDriverWait(browser, 60).until(lambda _: rows.text.isdigit() and int(rows.text) >= ROWS)
        held = browser.find_element(By.ID, "held-requests")
        WebDriverWait(browser, 20, 0.05).until(lambda _: held.text.isdigit() and 5 <= int(held.text) <= 20)
        bottom = browser.execute_script(
            "return document.querySelector('main').getBoundingClientRect().bottom"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": bottom, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    args = sys.argv[1:]
    shoot(args[0], args[1] if len(args) > 1 else "light", int(args[2]) if len(args) > 2 else 1300)
