"""The report of a real run in a real browser: nothing in red, every picture there."""

import json
import sys

import pytest

from mmscale.report.page import write_page
from tests.whole.browser import CHROMIUM, Browser
from tests.whole.small_run import ALONE, succeed, words_for, write_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tools/install-system-packages.sh"),
]
WINDOWS = {"wide": (1280, 900, False), "dark": (1280, 900, True), "phone": (390, 844, False)}
EVIL = '<img src=x onerror="window.harm=1"><script>window.harm=1</script>\0\u202ebackwards'


@pytest.fixture(scope="module")
def folder(synthetic, tmp_path_factory):
    """A run of 20 steps that was evaluated four times, its page written again afterwards."""
    settings = write_settings(tmp_path_factory.mktemp("settings"))
    run_dir = tmp_path_factory.mktemp("run") / "run"
    words = ["eval.every=5 steps", "probe.every=5 steps", "log.page=true", f"run.dir={run_dir}"]
    succeed([*ALONE, *words_for(synthetic, settings), *words])
    (run_dir / "report.html").unlink()
    report = [sys.executable, "-m", "mmscale.cli", "report", run_dir]
    succeed([*report, "--data", synthetic.train])
    assert str(synthetic.train) in (run_dir / "report.html").read_text("utf-8")
    return run_dir


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path) as window:
        yield window


def dot(browser, number):
    """Middle of the first image's dot on one of the maps, in the window."""
    browser.value(f"document.querySelectorAll('svg.map')[{number}].scrollIntoView()")
    return browser.value(
        f"(() => {{ const box = document.querySelectorAll('svg.map')[{number}]"
        ".querySelector('.image circle').getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2] })()"
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_every_picture_is_drawn_and_nothing_complains(folder, browser, window):
    width, height, dark = WINDOWS[window]
    browser.open(folder / "report.html", width, height, dark)
    # What is folded must be drawn as well.
    browser.value("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    pictures = browser.value("[...document.images].map((i) => [i.naturalWidth, i.clientWidth])")
    assert len(pictures) > 30
    assert all(natural > 0 and seen > 0 for natural, seen in pictures)
    assert browser.value("document.querySelectorAll('svg.map circle').length") == 4 * 2 * 24
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.getElementById('verdict').innerText.trim().length") > 20
    assert browser.complaints == []


def test_a_dot_shows_its_image_and_caption_and_its_pair_on_every_map(folder, browser):
    browser.open(folder / "report.html", 1280, 900)
    shown = json.loads((folder / "examples.json").read_text("utf-8"))["points"]
    browser.point(*dot(browser, 1))
    told = browser.value("document.getElementById('tip').innerText")
    chosen = "[...document.querySelectorAll('circle.on')].map((mark) => mark.dataset.pair)"
    pairs = set(browser.value(chosen))
    assert len(pairs) == 1
    assert told.strip() == shown[int(pairs.pop())]["caption"]
    assert len(browser.value(chosen)) == 2 * 4
    assert browser.value("document.querySelector('#tip img').naturalWidth") > 0
    browser.point(5, 5)
    assert browser.value("document.getElementById('tip').hidden")
    assert browser.complaints == []


def test_hostile_captions_are_shown_as_text(folder, browser, tmp_path):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("metrics.jsonl", "space.jsonl", "doctor.json", "examples.json"):
        (hostile / name).write_bytes((folder / name).read_bytes())
    content = json.loads((hostile / "examples.json").read_text("utf-8"))
    for entry in (*content["points"], *content["best"], *content["worst"]):
        entry["caption"] = EVIL
    (hostile / "examples.json").write_text(json.dumps(content), "utf-8")
    browser.open(write_page(hostile).path, 1280, 900)
    browser.point(*dot(browser, 0))
    told = browser.value("document.getElementById('tip').innerText")
    assert told.strip() == EVIL.replace("\0", "").replace("\u202e", "")
    assert browser.value("window.harm") is None
    assert browser.complaints == []
