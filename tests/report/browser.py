"""Run a page in headless Chromium, offline, and read what its script made of it."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-default-apps", "--hide-scrollbars",
    # no name resolves: a page that asks for anything gets nothing
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
)  # fmt: skip
# a page of ours around the report, which may look into it and press its keys
INSIDE = ("--allow-file-access-from-files", "--disable-web-security")


def browser() -> str:
    """The browser's program; skips the test where there is none."""
    given = os.environ.get("HEADWISE_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(
            f"no Chromium found ({', '.join(NAMES)}), so the page's script was not run; "
            "HEADWISE_CHROMIUM can name one"
        )
    return found


def rendered(page: Path, folder: Path, fragment: str = "", flags: tuple[str, ...] = ()) -> "Dom":
    """The page's elements after its script ran. fragment: what follows "#" in the address."""
    address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
    command = [
        browser(), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=180, check=False)
    text = done.stdout.decode("utf-8", errors="replace")
    if "</html>" not in text:
        raise AssertionError(f"Chromium gave no page: {done.stderr.decode()[-2000:]}")
    return Dom(text)


def driven(page: Path, folder: Path, script: str, width: int = 1280, fragment: str = "") -> Any:
    """What a script returns that runs beside the page: `page` is its window, `$` finds in it,
    `press(element, key)` sends a key, `settle()` waits for it to be drawn."""
    harness = folder / "harness.html"
    address = json.dumps(page.resolve().as_uri() + (f"#{fragment}" if fragment else ""))
    harness.write_text(
        f"""<!doctype html><meta charset="utf-8"><body><pre id="result"></pre><script>
        const frame = document.createElement("iframe");
        frame.style.cssText = "width:{width}px;height:900px;border:0";
        frame.src = {address};
        const wait = (ms) => new Promise((done) => setTimeout(done, ms));
        frame.onload = async () => {{
          let result;
          try {{
            const page = frame.contentWindow;
            const $ = (query) => page.document.querySelector(query);
            const $$ = (query) => [...page.document.querySelectorAll(query)];
            const settle = () => wait(80);
            const press = (element, key) => element.dispatchEvent(
              new page.KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
            await wait(200);
            result = {{ value: await (async () => {{ {script} }})() }};
          }} catch (error) {{ result = {{ error: String(error) }}; }}
          document.getElementById("result").textContent = JSON.stringify(result);
        }};
        document.body.append(frame);
        </script>""",
        encoding="utf-8",
    )
    dom = rendered(harness, folder, flags=INSIDE)
    found = re.search(r'<pre id="result">(.*?)</pre>', dom.source, re.DOTALL)
    assert found is not None
    assert found[1], "the script did not come to its end"
    result = json.loads(unescape(found[1]))
    assert "error" not in result, result["error"]
    return result.get("value")


class Dom(HTMLParser):
    """Elements of a page as (tag, attributes), and the text of those that have an id."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    @property
    def page(self) -> dict[str, str | None]:
        """Attributes of <html>, where the script says how it went."""
        return self.elements[0][1]

    def having(self, attribute: str) -> list[str]:
        """The values of an attribute, in the order of the page."""
        return [a[attribute] or "" for _, a in self.elements if attribute in a]

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements with this class."""
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]
