"""Write docs/images/report.png, the README's picture of a report, with headless Chromium.

python tools/shoot_report.py RUN
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1120, 1560  # of each half, page pixels
MIDDLE = 840  # of the picture's half, pixels

sys.path.insert(0, str(ROOT))


def shoot(run_dir: Path) -> None:
    """The top of the page, and beside it the space with a pair under the pointer."""
    from tests.whole.browser import Browser

    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        browser.open(run_dir / "report.html", WIDTH, HEIGHT)
        halves = [_window(browser, Path(folder))]
        browser.value("document.getElementById('space').scrollIntoView()")
        place = browser.value(
            "(() => { const map = [...document.querySelectorAll('svg.map')].at(-2);"
            " const dots = [...map.querySelectorAll('.image circle')];"
            " const box = dots[dots.length >> 1].getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        browser.point(*place)
        halves.append(_window(browser, Path(folder)))
    both = Image.new("RGB", (2 * WIDTH, HEIGHT))
    for number, half in enumerate(halves):
        both.paste(half, (number * WIDTH, 0))
    scaled = both.resize((2 * MIDDLE, HEIGHT * MIDDLE // WIDTH), Image.Resampling.LANCZOS)
    # A palette: a third of the bytes, and flat colours stay flat.
    scaled.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


def _window(browser, folder: Path) -> Image.Image:
    shot = folder / "shot.png"
    browser.screenshot(shot, whole=False)
    return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")


if __name__ == "__main__":
    shoot(Path(sys.argv[1]))
