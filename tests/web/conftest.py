"""One server and one browser for all tests of the page."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detecting import detector

from epsanet.network.detectors import save_detector

DIGITS, CIFAR = "epsanet14_tiny.digits", "epsanet23_tiny_wide.cifar10"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


load = _module(Path(__file__).parents[2] / "benchmarks" / "serve.py")


@dataclass(frozen=True)
class Server:
    """The page, served by the command."""

    url: str
    folder: Path
    """Of its own files."""
    visitor: Any


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that finds something anywhere, surer here than there."""
    folder = tmp_path_factory.mktemp("detectors") / "finder"
    model = detector()
    with torch.no_grad():
        model.network.roi_heads.box_predictor.cls_score.bias[2] = 3.0
    save_detector(folder, model, ["ant", "bee", "cow"])
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, detector_folder: Path) -> Iterator[Server]:
    pytest.importorskip("gradio")
    place = tmp_path_factory.mktemp("serve")
    (place / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place / "tmp"))
        process, url = load.start([DIGITS, CIFAR, str(detector_folder)], place / "log")
    try:
        (folder,) = (place / "tmp").glob("epsanet-serve-*")
        yield Server(url, folder, load.Visitor(url))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in (place / "log").read_text(), "whatever visitors send"
    assert [path for path in (place / "tmp").iterdir() if path.name != "__pycache__"] == [], "something was left behind"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    programs = [shutil.which(name) for name in names], shutil.which("chromedriver")
    program = next(filter(None, programs[0]), None)
    if program is None or programs[1] is None:
        pytest.skip("there is no Chromium with its driver; Debian has them in chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # a page that works offline
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()
