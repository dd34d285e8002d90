"""A real browser without a window, spoken to through a pipe in Chrome's DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = """(() => {
  const page = document.documentElement, width = WIDTH;  // innerWidth grows with what is too wide, on a phone
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre') &&
    e.getBoundingClientRect().right > width + 1).map(e => e.tagName + '.' + e.className);
  const images = [...document.images];
  return {scroll: page.scrollWidth, wide,
    missing: images.filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt), images: images.length,
    type: parseFloat(getComputedStyle(document.querySelector('td') || document.body).fontSize)};
})()"""


@dataclass(frozen=True)
class Seen:
    """What a page looks like at one width; sizes in CSS pixels."""

    errors: list[str]
    """Of the console, and whatever was not loaded."""
    asked_for: list[str]
    """Addresses other than the page's own and data: ones."""
    scroll_px: int
    too_wide: list[str]
    """Elements that reach over the right edge, tables that scroll in themselves aside."""
    missing: list[str]
    """Pictures that do not show."""
    images: int
    type_px: float
    screenshot: bytes


def chromium() -> str:
    """The browser's path; skips where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium here (Debian: apt-get install --no-install-recommends chromium)")
    return found


class Browser:
    """One browser process for several pages."""

    def __init__(self) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", "--disable-extensions", "--disable-background-networking"]
        flags += ["--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
        flags += [f"--user-data-dir={self._profile.name}", "about:blank"]
        command = f"exec {shlex.join([chromium(), *flags])} 3<&{theirs_in} 4>&{theirs_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._count, self._rest, self._events = 0, b"", []  # type: ignore[var-annotated]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def look(self, page: Path, width_px: int, height_px: int = 844) -> Seen:
        """Open the page at this width, as on a phone below 500 px, and look at all of it."""
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        tab = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", tab=tab)
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": width_px < 500}
        self._ask("Emulation.setDeviceMetricsOverride", size, tab)
        self._events.clear()
        self._ask("Page.navigate", {"url": page.absolute().as_uri()}, tab)
        self._until("Page.loadEventFired")
        look = {"expression": LOOK.replace("WIDTH", str(width_px)), "returnByValue": True}
        found = self._ask("Runtime.evaluate", look, tab)["result"]["value"]
        shot = self._ask("Page.captureScreenshot", {"captureBeyondViewport": True}, tab)["data"]
        self._ask("Target.closeTarget", {"targetId": target})
        return Seen(
            errors=[told for event in self._events if (told := _error(event))],
            asked_for=[url for event in self._events if (url := _address(event)) and url != page.absolute().as_uri()],
            scroll_px=found["scroll"],
            too_wide=found["wide"],
            missing=found["missing"],
            images=found["images"],
            type_px=found["type"],
            screenshot=base64.b64decode(shot),
        )

    def _ask(self, method: str, params: dict[str, Any] | None = None, tab: str | None = None) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params or {}} | ({"sessionId": tab} if tab else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (told := self._read()).get("id") != self._count:
            self._events.append(told)
        assert "error" not in told, told
        return told["result"]

    def _until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            news = os.read(self._in, 1 << 20)
            assert news, "the browser ended"
            self._rest += news
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


def _error(event: dict[str, Any]) -> str:
    params = event.get("params", {})
    match event.get("method"):
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            return params["entry"]["text"]
        case "Runtime.exceptionThrown":
            return str(params["exceptionDetails"])
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            return str(params["args"])
        case "Network.loadingFailed":
            return params["errorText"]
    return ""


def _address(event: dict[str, Any]) -> str:
    if event.get("method") != "Network.requestWillBeSent":
        return ""
    url = event["params"]["request"]["url"]
    return "" if url.startswith("data:") else url
