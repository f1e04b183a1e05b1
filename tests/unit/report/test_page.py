import base64
import hashlib
import json
import random
from contextlib import suppress
from html.parser import HTMLParser

import pytest
import yaml

from mmscale.config.schema import Config
from mmscale.errors import ConfigError, DataError, MmscaleError
from mmscale.report.page import write_page
from mmscale.report.verdicts import VERDICTS

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>"
STEERING = "a\0b\u202ereversed\u2066\x1b[31m"


class Reader(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.lasttag = ""


@pytest.fixture
def folder(tmp_path, run_lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run_lines))
    return tmp_path


@pytest.fixture
def full_folder(folder, space, make_examples):
    config = Config.model_validate({"data": {"train": EVIL}, "train": {"global_batch_size": 32}})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "space.jsonl").write_text("".join(json.dumps(moment) + "\n" for moment in space))
    make_examples(EVIL + STEERING, EVIL).write(folder)
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


def test_a_page_is_written_from_the_metrics_alone(folder):
    page = write_page(folder).path
    assert page == folder / "report.html"
    text = Reader(page).text
    assert "Not diagnosed" in text
    assert "41.0" in text
    assert "finished" in text
    assert [path.name for path in folder.glob(".*")] == []


def test_an_empty_log_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "not finished" in Reader(write_page(tmp_path).path).text


def test_everything_in_the_folder_is_shown_in_order(full_folder):
    reader = Reader(write_page(full_folder).path)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert ids == [
        *("verdict", "evidence", "recalls", "training", "space", "maps", "pairs", "tip"),
        *("gallery", "suspects", "health", "configuration", "facts"),
    ]
    assert sum("frame" in attrs.get("class", "").split() for _, attrs in reader.tags) == 11
    assert sum(tag == "circle" for tag, _ in reader.tags) == 2 * 2 * 8
    for part in ("Unaligned", "also: hubness", "look at the pairs", "0.5123", "3.4700 nats"):
        assert part in reader.text


def test_text_from_data_stays_text(full_folder):
    reader = Reader(write_page(full_folder).path)
    assert len(reader.scripts) == 1
    assert "alert" not in reader.scripts[0]
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    # Every place that shows a caption or a cause; keys stand in attributes too.
    assert reader.text.count("alert('x')") >= 8 + 3 + 1 + 2 + 1
    sources = [attrs["src"] for tag, attrs in reader.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)


def test_control_and_direction_characters_are_removed_from_the_page(full_folder):
    content = write_page(full_folder).path.read_text("utf-8")
    assert not set(content) & set("\0\x1b\u202e\u2066")
    assert "abreversed" in content


def test_the_policy_names_the_script_and_the_style_of_the_page(full_folder):
    page = write_page(full_folder).path
    content, reader = page.read_text("utf-8"), Reader(page)
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    style = content.partition("<style>")[2].partition("</style>")[0]
    for rule, code in (("script-src", reader.scripts[0]), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not any("style" in attrs for _, attrs in reader.tags)


def test_a_run_folder_may_have_any_name(folder):
    evil = folder / "<script>x"
    evil.mkdir()
    (folder / "metrics.jsonl").rename(evil / "metrics.jsonl")
    assert "script" not in {tag for tag, _ in Reader(write_page(evil).path).tags}


def test_the_page_loads_nothing_from_elsewhere(full_folder):
    page = write_page(full_folder).path
    for tag, attrs in Reader(page).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    style = page.read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(
    "damage",
    [
        {"picture": "http://evil.example/x"},
        {"picture": "data:image/svg+xml;base64,AAAA"},
        {"picture": 'data:image/webp;base64,AA" onerror="alert(1)'},
        {"id": "x"},
    ],
)
def test_photographs_from_elsewhere_are_refused(full_folder, damage):
    path = full_folder / "examples.json"
    content = json.loads(path.read_text())
    content["photos"]["1"] |= damage
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"examples\.json"):
        write_page(full_folder)


def test_a_photograph_that_is_missing_is_told(full_folder):
    path = full_folder / "examples.json"
    content = json.loads(path.read_text())
    del content["photos"]["5"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="photo 5"):
        write_page(full_folder)


def test_maps_are_drawn_without_examples(full_folder):
    (full_folder / "examples.json").unlink()
    reader = Reader(write_page(full_folder).path)
    assert sum(tag == "circle" for tag, _ in reader.tags) == 2 * 2 * 8
    assert "gallery" not in [attrs.get("id") for _, attrs in reader.tags]


def test_a_run_that_has_only_begun_is_not_called_red(folder):
    early = {"verdict": "too_few_samples", "evidence": {"updates": 28.0, "variance_text": 0.001}}
    (folder / "doctor.json").write_text(json.dumps(early))
    page = write_page(folder).path.read_text("utf-8")
    assert 'class="card verdict none"' in page
    assert "Too early to say" in page


@pytest.mark.parametrize("name", [*VERDICTS, "some_new_verdict"])
def test_every_verdict_has_a_title_on_the_page(folder, name):
    (folder / "doctor.json").write_text(json.dumps({"verdict": name}))
    words = Reader(write_page(folder).path).text
    title = VERDICTS[name].title if name in VERDICTS else "Some new verdict"
    assert title in words


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 10**5, '{"evidence": ' * 50 + "1" + "}" * 50, '{"verdict": 1}']
)
def test_a_damaged_file_is_told(folder, content):
    (folder / "doctor.json").write_text(content)
    with pytest.raises(DataError, match=r"doctor\.json: is not what the doctor writes"):
        write_page(folder)


@pytest.mark.parametrize("name", ["svg", ["pca"], 3])
def test_an_unknown_map_in_the_stored_configuration_is_refused(full_folder, name):
    (full_folder / "config.yaml").write_text(yaml.safe_dump({"log": {"map": name}}))
    with pytest.raises(ConfigError, match=r"config\.yaml: log\.map is"):
        write_page(full_folder)


ODD = (None, True, -1, 0, 10**40, 1e308, "x", "9" * 5000, [], [[]], {}, {"a": [None]}, [1e308, -1])


def spoil(content, draw: random.Random) -> None:
    """Put something odd at one place of a nest of dicts and lists."""
    while True:
        key = draw.choice(list(content if isinstance(content, dict) else range(len(content))))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.25:
            content[key] = draw.choice(ODD)
            return
        content = inner


@pytest.mark.parametrize("name", ["doctor.json", "space.jsonl", "examples.json", "config.yaml"])
@pytest.mark.parametrize("seed", [*range(4), pytest.param(range(4, 100), marks=pytest.mark.soak)])
def test_an_edited_file_of_a_run_is_drawn_or_refused_in_a_sentence(full_folder, name, seed):
    path = full_folder / name
    whole = path.read_text("utf-8")
    for number in [seed] if isinstance(seed, int) else seed:
        draw = random.Random(f"{name} {number}")
        if name == "config.yaml":
            content = yaml.safe_load(whole)
            spoil(content, draw)
            path.write_text(yaml.safe_dump(content))
        else:
            objects = [json.loads(line) for line in whole.splitlines()]
            spoil(draw.choice(objects), draw)
            path.write_text("".join(json.dumps(one) + "\n" for one in objects))
        with suppress(MmscaleError):
            write_page(full_folder)


def test_a_folder_without_metrics_is_told(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_page(tmp_path)


def test_every_evaluation_set_has_its_table_and_its_curve(tmp_path):
    def line(step, value):
        own = {f"{way}_r{k}": value + k for way in ("i2t", "t2i") for k in (1, 5, 10)}
        own |= {"mean": value, "images": 20, "captions": 100}
        pets = {"top1": value, "mean_per_class": 12.5, "images": 8, "classes": 4}
        return {
            "step": step,
            **{f"eval/coco/{name}": figure for name, figure in own.items()},
            **{f"eval/pets/{name}": figure for name, figure in pets.items()},
        }

    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line(step, 2.0 * step)) + "\n" for step in (5, 10)))
    written = write_page(tmp_path)
    page = Reader(written.path)
    assert ("section", {"class": "card", "id": "set-coco"}) in page.tags
    assert "30.0" in page.text, "R@10 of the last line"
    assert "after step 10 over 20 images and 100 captions" in page.text
    assert ("section", {"class": "card", "id": "set-pets"}) in page.tags
    assert "over 8 images of 4 classes" in page.text
    assert "chance 25.00" in page.text
    assert "top5" not in page.text
    assert [picture.title for picture in written.pictures] == ["Every evaluation set"]
