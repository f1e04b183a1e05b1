"""`~` and `$` in every setting that names a path."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from mmscale.cli import app
from mmscale.config.load import load_config
from mmscale.config.paths import expanded, is_path
from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from tests.test_house import settings

# Settings whose description speaks of files and which name none.
NO_PATHS = {
    "checkpoint.best",
    "log.profile",
    "log.page",
    "data.epoch_samples",
    "data.cache_gb",
    "data.columns.image",
    "data.keys.json",
    "data.keys.text",
}
ABOUT_PATHS = re.compile(r"\b(file|folder|path|npz|JSON|tars?)\b|hf:|openclip:", re.IGNORECASE)


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", "/h")


EXPANDED = {
    "~": "/h",
    "~/a/b": "/h/a/b",
    "~root/x": None,
    "hf:~/m": "hf:/h/m",
    "openclip:local-dir:~/m": "openclip:local-dir:/h/m",
    "~/a-{000..003}.tar": "/h/a-{000..003}.tar",
    "{~/a,b,~/c}/*.tar": "{/h/a,b,/h/c}/*.tar",
    "a~/b~1/file~": "a~/b~1/file~",
    "https://host/~me/$x": "https://host/~me/$x",
    "pipe:cat ~/$X": "pipe:cat ~/$X",
    "price$.tar": "price$.tar",
    "pretrained": "pretrained",
}


@pytest.mark.parametrize("text", EXPANDED)
def test_home_folders_in_paths_are_expanded_once(text):
    wanted = EXPANDED[text]
    assert not expanded(text).startswith("~") if wanted is None else expanded(text) == wanted
    assert expanded(expanded(text)) == expanded(text)


@pytest.mark.parametrize(
    "text",
    ["$HOME/a", "a/${B}/c", "${B", "a$(pwd)", "~no-such-user/x", "a/~/b", "./~", "{a,~}/x/~"],
)
def test_a_path_with_a_variable_an_unknown_user_or_an_inner_tilde_is_refused(text):
    with pytest.raises(ValueError, match="write the path out"):
        expanded(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hf://models/a/b", "hf://"),
        ("file:///a/b", "file://"),
        ("abfss://x/a", "abfss://"),
        ("ftp://x/a", "ftp://"),
        (str(Path("s3://bucket/a")), "s3://"),
    ],
)
def test_a_store_that_is_not_read_is_named_with_what_is(text, named):
    told = f"^`{named}` is not read here; give a path on a disk, .* s3://, gs://, az:// or hf://d"
    for far in (True, False):
        with pytest.raises(ValueError, match=told):
            expanded(text, far=far)


@pytest.mark.parametrize(
    "text", ["s3://b/a-{0..3}.tar", "gs://b/~x/$y", "az://c/a", "hf://datasets/a/b@v1/c"]
)
def test_a_store_is_read_in_the_place_of_shards_only(text):
    assert expanded(text, far=True) == text
    with pytest.raises(ValueError, match="is not read here but for shards; give a path on a disk"):
        expanded(text)


def test_where_a_store_may_stand_in_settings_and_at_verbs(tmp_path):
    config = load_config(["demo", "data.train=[a, s3://b/c]", "data.eval=hf://datasets/o/n/val"])
    assert config.data.train == ["a", "s3://b/c"]
    told = r"`s3://` is not read here but for shards"
    for word in ("run.dir=s3://b/r", "model.text.weights=s3://b/w"):
        with pytest.raises(ConfigError, match=told):
            load_config(["demo", "data.train=x", word])
    with pytest.raises(ConfigError, match=r"`file://` is not read here; give a path"):
        load_config(["demo", "data.train=file:///a.tar"])
    for verb in (["pack", "--out", str(tmp_path)], ["eval", "--data", "x"]):
        with pytest.raises(ConfigError, match=r"`s3://` is not read here"):
            app([*verb, "s3://b/a"], standalone_mode=False)


def test_without_a_home_the_tilde_is_refused(monkeypatch):
    monkeypatch.delenv("HOME")
    # A user whom the machine's list does not name, as in many containers.
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    with pytest.raises(ValueError, match="HOME is not set"):
        expanded("~/x")


def _holds_text(annotation: Any) -> bool:
    return annotation is str or any(_holds_text(inner) for inner in get_args(annotation))


def test_every_setting_that_names_a_path_has_the_type_of_one():
    paths = {name for name, field in settings(Config) if is_path(field)}
    assert {"run.dir", "data.train", "data.train.shards", "engine.deepspeed"} <= paths
    spoken_of = {
        name
        for name, field in settings(Config)
        if _holds_text(field.annotation) and ABOUT_PATHS.search(field.description or "")
    }
    assert spoken_of - paths - NO_PATHS == set()


WORDS = [
    "run.dir={}",
    "run.resume={}",
    "data.train={}",
    "data.train=[a, {}]",
    "data.train=[{{shards: {}, weight: 2}}]",
    "data.eval=[a, {}]",
    "data.decoded_cache={}",
    "data.hard_batches.table={}",
    "model.text.weights={}",
    "model.vision.name=hf:{}",
    "engine.deepspeed={}",
]


@pytest.mark.parametrize("word", WORDS)
def test_path_settings_given_as_words_are_expanded_or_refused(word):
    config = load_config(["demo", "data.train=x", word.format("~/y")])
    assert "/h/y" in str(config)
    with pytest.raises(ConfigError) as refused:
        load_config(["demo", "data.train=x", word.format("$DATA/y")])
    (sentence,) = str(refused.value).split("\n")
    assert sentence.startswith(word.partition("=")[0])
    assert "`$DATA` is not filled in here" in sentence


def test_the_name_of_a_config_file_is_expanded_like_the_paths_in_it(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("run: {dir: ~/runs/a}\ndata: {train: ~/pairs}")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(["~/x.yaml"])
    assert (config.run.dir, config.data.train) == (f"{tmp_path}/runs/a", f"{tmp_path}/pairs")
    with pytest.raises(ConfigError, match=r"~nobody-here/x\.yaml: .*no user is named"):
        load_config(["~nobody-here/x.yaml"])
