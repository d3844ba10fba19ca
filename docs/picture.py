"""The picture in README.md: the top of a report, as a browser shows it.

    python docs/picture.py runs/paper/report.html docs/report.png

Needs `pip install playwright && playwright install chromium`.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1100, 900  # pixels of the page


def main(page: str, picture: str) -> None:
    with sync_playwright() as started:
        browser = started.chromium.launch()
        shown = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        shown.goto(Path(page).resolve().as_uri())
        shown.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
