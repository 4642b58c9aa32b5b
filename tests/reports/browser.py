"""A headless Chromium, where there is one: what a page looks like, and what it complains of."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: a page is looked at")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and every line on the console: a refused request writes one too."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, OFFLINE, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr)


def screenshot(page: Path, width: int, height: int) -> Path:
    """PNG of the page's top."""
    path = page.with_name(f"{page.stem}-{width}.png")
    browse(page, f"--screenshot={path}", f"--window-size={width},{height}")
    return path


def overflow(page: Path, width: int) -> int:
    """How many pixels the page is wider than a frame of `width`: a window can't be as narrow as a phone."""
    frame = page.with_name("frame.html")
    script = (
        "const f = document.querySelector('iframe'); f.onload = () => "
        "{ document.title = f.contentDocument.documentElement.scrollWidth; }"
    )
    content = html.escape(page.read_text(), quote=True)
    frame.write_text(
        f'<title>none</title><iframe style="border:0;width:{width}px;height:800px" srcdoc="{content}"></iframe>'
        f"<script>{script}</script>"
    )
    document, _ = browse(frame, "--dump-dom", "--virtual-time-budget=5000")
    return int(document.partition("<title>")[2].partition("</title>")[0]) - width
