"""The page in a real browser: a picture goes in, and what is seen changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CIFAR, DIGITS, Server, load

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's sockets
SECONDS = 60


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser: Any, url: str, width: int) -> None:
        self.browser = browser
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)
        self.wait(lambda: self.all("#picture input[type=file]"))

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", css)
        return found

    def text(self, css: str) -> str:
        """Of all such elements as they are; empty when there are none."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join(' ')"
        return str(self.browser.execute_script(script, css))

    def source(self, css: str) -> str:
        script = "const e = document.querySelector(arguments[0]); return e ? e.src : ''"
        return str(self.browser.execute_script(script, css))

    def wait(self, condition: Callable[[], Any]) -> Any:
        until = time.monotonic() + SECONDS
        while not (found := condition()):
            assert time.monotonic() < until, f"waited for nothing; the page says: {self.text('body')}"
            time.sleep(0.1)
        return found

    def upload(self, path: Path) -> None:
        """Into the drop area, or in the place of the picture that is there."""
        clear = self.all("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']")
        if clear:
            clear[0].click()
        self.wait(lambda: self.all("#picture input[type=file]"))[0].send_keys(str(path))

    def choose(self, model: str) -> None:
        self.all("#model input")[0].click()
        self.wait(lambda: [option for option in self.all("[role=option]") if model in option.text])[0].click()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("digits")
    paths = [folder / f"{number}.png" for number in range(8)]
    for path, content in zip(paths, load.digits(8), strict=True):
        path.write_bytes(content)
    return paths


def test_a_visitor_sees_the_classes_of_a_picture_and_where_and_at_which_scale_it_looks(
    server: Server, browser: Any, digits: list[Path]
) -> None:
    page = Page(browser, server.url, 1200)
    page.upload(digits[3])
    page.wait(lambda: "3" in page.text("#classes h2"))
    page.wait(lambda: page.all("#scales table"))
    shown = [page.text(f"#scales table:nth-of-type({table}) tbody td").split() for table in (1, 2)]
    scales = server.visitor.use("scales", digits[3].read_bytes(), DIGITS)
    assert page.text("#scales thead").split() == ["3×3", "5×5", "7×7", "9×9"] * 2
    for cells, measure in zip(shown, ("attention", "energy"), strict=True):
        assert cells == [f"{share:.1%}" for entry in scales for share in entry[measure]]
    first = page.wait(lambda: page.source("#cam img"))
    page.upload(digits[7])
    page.wait(lambda: "7" in page.text("#classes h2"))
    page.wait(lambda: page.source("#cam img") not in ("", first))
    width = page.browser.execute_script("return document.querySelector('#cam img').naturalWidth")
    assert width == 448, "the browser has decoded the picture"
    origins = browser.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(origins) == {server.url}


def test_a_bad_file_is_answered_in_words_and_a_good_one_after_it_is_shown(
    server: Server, browser: Any, digits: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    page = Page(browser, server.url, 1200)
    page.upload(digits[3])
    page.wait(lambda: page.all("#scales table"))
    page.upload(bad)
    page.wait(lambda: "This picture cannot be used: no JPEG, PNG or WebP picture" in page.text("[role=alert]"))
    assert page.text("#classes h2") == ""
    assert page.source("#cam img") == ""
    assert not page.all("#scales table"), "nothing of the picture before is left"
    (shown,) = page.wait(lambda: page.all("#picture img"))
    assert not shown.is_displayed(), "browsers show a broken picture"
    page.upload(digits[5])
    page.wait(lambda: "5" in page.text("#classes h2"))
    assert not page.all("[role=alert]")
    assert page.all("#picture img")[0].is_displayed()


def test_another_model_looks_at_the_same_picture(server: Server, browser: Any, digits: list[Path]) -> None:
    page = Page(browser, server.url, 1200)
    page.upload(digits[3])
    page.wait(lambda: "3" in page.text("#classes h2"))
    page.choose(CIFAR)
    best = server.visitor.use("predict", digits[3].read_bytes(), CIFAR, 0.5)["classes"][0]["class"]
    page.wait(lambda: best in page.text("#classes h2"))
    assert "32×32 pixels" in page.text(".describes")


def test_a_model_that_is_chosen_while_another_is_at_work_is_the_one_that_answers(
    server: Server, browser: Any, digits: list[Path]
) -> None:
    page = Page(browser, server.url, 1200)
    page.upload(digits[3])
    page.wait(lambda: "3" in page.text("#classes h2"))
    best = server.visitor.use("predict", digits[3].read_bytes(), CIFAR, 0.5)["classes"][0]["class"]
    content = digits[3].read_bytes()
    others = [
        threading.Thread(target=server.visitor.use, args=("predict", content, "finder", 0.5), daemon=True)
        for _ in range(8)
    ]
    for other in others:  # these are asked first, so that the page has to wait
        other.start()
    page.choose("finder")
    page.wait(lambda: page.text(".describes") and "32×32" not in page.text(".describes"))
    page.choose(CIFAR)
    page.wait(lambda: best in page.text("#classes h2"))
    for other in others:
        other.join(SECONDS)
    page.wait(lambda: best in page.text("#classes h2") and "32×32 pixels" in page.text(".describes"))
    assert not page.source("#drawn img")


def test_objects_are_drawn_and_the_slider_leaves_the_surest(server: Server, browser: Any, digits: list[Path]) -> None:
    page = Page(browser, server.url, 1200)
    page.choose("finder")
    page.wait(lambda: page.all("#score input[type=number]"))
    page.upload(digits[3])
    page.wait(lambda: "×" in page.text("#found"))
    many, drawn = page.text("#found"), page.source("#drawn img")
    found = server.visitor.use("predict", digits[3].read_bytes(), "finder", 0.5)["objects"]
    assert sum(int(word) for word in many.split() if word.isdigit()) == len(found) > 0
    slider = page.all("#score input[type=range]")[0]
    slider.send_keys("\ue010")  # the key End
    page.wait(lambda: "Nothing with this score" in page.text("#found"))
    page.wait(lambda: page.source("#drawn img") not in ("", drawn))
    assert not page.all("#classes")


def test_a_picture_to_try_is_one_click_away_and_a_telephone_shows_all_of_it(server: Server, browser: Any) -> None:
    page = Page(browser, server.url, 390)
    page.wait(lambda: page.all(".gallery-item"))[0].click()
    page.wait(lambda: page.text("#classes h2").strip())
    page.wait(lambda: page.all("#scales table"))
    width, content = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert (width, content) == (390, 390), "nothing to push sideways"
