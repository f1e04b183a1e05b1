import json
from html.parser import HTMLParser

import pytest
import yaml

from mmscale.config.schema import Config
from mmscale.errors import DataError
from mmscale.report.page import write_page
from mmscale.report.verdicts import VERDICTS

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>"


class Reader(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folder(tmp_path, run_lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run_lines))
    return tmp_path


@pytest.fixture
def full_folder(folder, histograms):
    config = Config.model_validate({"data": {"train": EVIL}, "train": {"global_batch_size": 32}})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "space.jsonl").write_text(json.dumps({"step": 40, "similarity": histograms}) + "\n")
    doctor = {
        "verdict": "unaligned",
        "also": ["hubness"],
        "confidence": 0.97,
        "evidence": {"caption": EVIL, "nested": {"auc": 0.512345}, "none": None},
        "causes": [EVIL],
        "remedies": ["look at the pairs"],
    }
    (folder / "doctor.json").write_text(json.dumps(doctor))
    return folder


def test_metrics_alone_make_a_page(folder):
    page = write_page(folder)
    assert page == folder / "report.html"
    text = Reader(page).text
    assert "Not diagnosed" in text
    assert "41.0" in text
    assert "finished" in text
    assert [path.name for path in folder.glob(".*")] == []


def test_an_empty_log_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "not finished" in Reader(write_page(tmp_path)).text


def test_everything_in_the_folder_is_shown_in_order(full_folder):
    reader = Reader(write_page(full_folder))
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert ids == ["verdict", "recalls", "pictures", "evidence", "configuration", "facts"]
    assert sum(tag == "img" for tag, _ in reader.tags) == 6
    for part in ("Unaligned", "also: hubness", "look at the pairs", "0.5123", "3.4657 nats"):
        assert part in reader.text


def test_text_from_data_stays_text(full_folder):
    reader = Reader(write_page(full_folder))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert reader.text.count("alert('x')") == 3


def test_a_run_folder_may_have_any_name(folder):
    evil = folder / "<script>x"
    evil.mkdir()
    (folder / "metrics.jsonl").rename(evil / "metrics.jsonl")
    assert "script" not in {tag for tag, _ in Reader(write_page(evil)).tags}


def test_the_page_loads_nothing_from_elsewhere(full_folder):
    page = write_page(full_folder)
    for tag, attrs in Reader(page).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    style = page.read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("name", [*VERDICTS, "some_new_verdict"])
def test_each_verdict_has_words(folder, name):
    (folder / "doctor.json").write_text(json.dumps({"verdict": name}))
    words = Reader(write_page(folder)).text
    title = VERDICTS[name].title if name in VERDICTS else "Some new verdict"
    assert title in words


def test_a_damaged_file_is_told(folder):
    (folder / "doctor.json").write_text("{")
    with pytest.raises(DataError, match=r"doctor\.json: is not JSON"):
        write_page(folder)


def test_a_folder_without_metrics_is_told(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_page(tmp_path)
