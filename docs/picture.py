"""The picture in README.md: the top of a report, as a browser shows it, in 256 colours.

    python docs/picture.py runs/paper/report.html docs/report.png

Needs `pip install playwright pillow` and a Chromium, the system's own or `playwright install
chromium`.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1040, 1000  # pixels of the page


def main(page: str, picture: str) -> None:
    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=own, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        shown.goto(Path(page).resolve().as_uri())
        pixels = shown.screenshot()
        browser.close()
    Image.open(io.BytesIO(pixels)).convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
