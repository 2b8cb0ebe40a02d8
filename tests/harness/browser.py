"""A real TensorBoard server and a real browser without a window, and what its page shows."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# Why there is no browser; empty where there is one.
MISSING = "" if CHROMIUM and DRIVER else "no Chromium is installed: apt-get install chromium chromium-driver"
if importlib.util.find_spec("selenium") is None:
    MISSING = "selenium is not installed: pip install 'lightning-optim[test]'"
# Everything that is shown, also inside of shadow roots, a line for each piece of text.
TEXT = """
const lines = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) lines.push(node.textContent.trim());
  if (["STYLE", "SCRIPT", "TEMPLATE", "DOM-MODULE"].includes(node.nodeName)) return;
  if (node.nodeType === Node.ELEMENT_NODE && node.nodeName !== "SLOT" && !node.checkVisibility()) return;
  for (const child of node.shadowRoot ? node.shadowRoot.childNodes : node.childNodes) walk(child);
  if (node.nodeName === "SLOT") for (const child of node.assignedNodes()) walk(child);
};
walk(document.body);
return lines;
"""


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """The address of a server on a free port, which shows a folder of logs."""
    args = ["--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *args], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise RuntimeError("TensorBoard has ended")
        yield found[0]
    finally:
        server.terminate()
        server.communicate()


class Page:
    """A page in the browser."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, route: str) -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}{route}")

    def text(self) -> list[str]:
        """The pieces of text that it shows."""
        shown: list[str] = self.driver.execute_script(TEXT)
        return shown

    def wait(self, seen: Callable[[list[str]], Any], seconds: float = 60) -> list[str]:
        """The text, once it shows what it should."""
        from selenium.webdriver.support.wait import WebDriverWait  # pyright: ignore[reportMissingImports]

        WebDriverWait(self.driver, seconds).until(lambda _: seen(self.text()))
        return self.text()

    def size(self, width: int, height: int) -> None:
        self.driver.set_window_size(width, height)

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(address: str) -> Iterator[Page]:
    """A page of Chromium."""
    from selenium import webdriver  # pyright: ignore[reportMissingImports]

    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Page(driver, address)
    finally:
        driver.quit()
