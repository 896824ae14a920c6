"""Opens the documentation site, and any pages given, in headless Chromium at desktop and phone width, and reports what a reader would trip over.

Reported are console errors, requests that fail, text that runs past the edge so that the page scrolls sideways, and links to files or
anchors that are not there. It needs a Chromium (Debian's package chromium) and PyPI's playwright, which no extra brings, because nothing else here uses it:
`pip install playwright`, in this environment or one of its own; it imports nothing else of ours, and playwright's own browsers are not needed. Run by us so
with Debian's Chromium, on the site and on reports.

make docs && python -m tests.long.pages_in_browser --chromium chromium --shots shots
python -m tests.long.pages_in_browser runs/demo/report.html docs/reproduction/fashion/tables.html
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urldefrag

SITE = Path(__file__).parents[2] / "site"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WIDE = """() => [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (box.width === 0 || box.right <= document.documentElement.clientWidth + 1) return false;
  for (let up = e.parentElement; up; up = up.parentElement)
    if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(up).overflowX)) return false;
  return getComputedStyle(e).position !== 'fixed';
}).slice(0, 3).map(e => `<${e.tagName.toLowerCase()} class="${e.className}"> ${e.textContent.trim().slice(0, 60)}`)"""
"""The elements that reach past the right edge and that no parent scrolls or cuts."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yields the address at which a server on loopback serves the folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="HTML files instead of the site")
    parser.add_argument("--chromium", default="chromium", help="program to start (default: chromium)")
    parser.add_argument("--shots", type=Path, help="folder for a picture of each page at each width")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("playwright is not installed: pip install playwright (its own browsers are not needed)")
    program = shutil.which(options.chromium) or sys.exit(f"--chromium = {options.chromium}: no such program; Debian's package is chromium")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    root = Path("/") if options.pages else SITE
    files = [page.resolve() for page in options.pages] or sorted(SITE.rglob("index.html"))
    if not files:
        sys.exit(f"{SITE}: no site there; run make docs")
    faults: list[str] = []
    anchors: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    with served(root) as address, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            here = ""

            def fault(what: str, name: str = name) -> None:
                faults.append(f"{here} ({name}): {what}")  # noqa: B023 (the page that is open when it is called)

            page.on("console", lambda message: fault(f"console: {message.text[:200]}") if message.type == "error" else None)
            page.on("pageerror", lambda error: fault(f"script: {str(error)[:200]}"))
            page.on("requestfailed", lambda request: fault(f"no answer: {request.url}"))
            for file in files:
                here = f"{address}/{file.relative_to(root).as_posix().removesuffix('index.html')}"
                page.goto(here, wait_until="load")
                page.wait_for_timeout(150)
                across = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
                if across > 0:
                    fault(f"scrolls {across} px sideways: {'; '.join(page.evaluate(WIDE))}")
                anchors[here] = set(page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)"))
                links[here] = set(page.evaluate("() => [...document.querySelectorAll('a[href]')].map(e => e.href)"))
                if options.shots:
                    shot = file.relative_to(root).with_suffix("").as_posix().replace("/", "-")
                    page.screenshot(path=options.shots / f"{shot}-{name}.png", full_page=True)
            page.close()
        request = browser.new_context().request
        for here, targets in links.items():
            for target in sorted(targets):
                whole, anchor = urldefrag(target)
                if not whole.startswith(address):
                    continue  # other sites cannot be reached from a test machine
                if whole in anchors:
                    if anchor and anchor not in anchors[whole]:
                        faults.append(f"{here}: no anchor {target}")
                elif request.head(whole).status != 200:
                    faults.append(f"{here}: dead link {target}")
        browser.close()
    for each in faults:
        print(each.replace(address, ""))
    print(f"{len(files)} pages at {len(SIZES)} widths, {sum(map(len, links.values()))} links: {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
