"""Take the screenshots of docs/serve.md, with Chromium: python docs/pictures/serve.py DETECTOR_FOLDER."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FOLDER = Path(__file__).parent / "serve"
DIGITS = "epsanet14_tiny.digits"


def start(detector: str) -> tuple[subprocess.Popen[str], str]:
    """A server at a free port, and its address."""
    command = [sys.executable, "-m", "epsanet", "serve", DIGITS, "epsanet23_tiny_wide.cifar10", detector, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://\S+", server.stdout.readline())
    assert found is not None, "the server did not start"
    return server, found[0]


def open_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def shoot(browser: webdriver.Chrome, url: str, name: str, width: int, model: str, example: int, shown: str) -> None:
    """One picture of the page after a click on an example.

    Args:
        browser: to use.
        url: of the page.
        name: of the PNG file.
        width: of the window in pixels.
        model: part of its name in the list.
        example: its place among the pictures to try.
        shown: CSS of what is waited for.
    """

    def resize(height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def wait(css: str) -> None:
        WebDriverWait(browser, 120).until(lambda page: page.find_elements(By.CSS_SELECTOR, css))

    resize(800)
    browser.get(url)
    wait("#picture input[type=file]")
    if model not in browser.find_element(By.CSS_SELECTOR, "#model input").get_attribute("value"):
        browser.find_element(By.CSS_SELECTOR, "#model input").click()
        wait("[role=option]")
        options = browser.find_elements(By.CSS_SELECTOR, "[role=option]")
        next(option for option in options if model in option.text).click()
        time.sleep(2)
    browser.find_elements(By.CSS_SELECTOR, ".gallery-item")[example].click()
    wait(shown)
    time.sleep(3)  # until nothing moves any more
    resize(browser.execute_script("return document.querySelector('.gradio-container').scrollHeight"))
    time.sleep(1)
    browser.save_screenshot(str(FOLDER / name))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        detector = shutil.copytree(sys.argv[1], Path(folder) / "digits-detection")
        server, url = start(str(detector))
        browser = open_browser()
        try:
            shoot(browser, url, "classifier.png", 1100, DIGITS, 0, "#scales table")
            shoot(browser, url, "phone.png", 390, DIGITS, 0, "#scales table")
            shoot(browser, url, "detector.png", 1100, "digits-detection", -1, "#drawn img")
        finally:
            browser.quit()
            server.send_signal(signal.SIGINT)
            server.wait()


if __name__ == "__main__":
    main()
