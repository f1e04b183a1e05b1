"""What is put on a page of a hub on loopback, and what is said of one that refuses it."""

import pytest
from huggingface_hub import constants

from mmscale.checkpoint.push import push_folder, require_page
from mmscale.errors import ConfigError
from tests.hub import TOKEN, running_hub

PAGE = "someone/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as running:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "files"
    (made / "part").mkdir(parents=True)
    (made / "README.md").write_text("---\ntags: [a]\n---\n\n# Model\n")
    (made / "part" / "model.safetensors").write_bytes(b"\0" * 5_000)
    return made


@pytest.mark.parametrize("xet", [False, True])
def test_files_arrive_on_the_branch_that_is_named(hub, folder, monkeypatch, xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.large = () if xet else (".safetensors",)
    require_page(PAGE)
    assert push_folder(folder, PAGE, private=True) == f"{hub.endpoint}/{PAGE}"
    push_folder(folder, PAGE, private=False, revision="v2")
    assert hub.pages == {PAGE: "private"}
    wanted = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files_of(folder)}
    assert hub.files == {(PAGE, "main"): wanted, (PAGE, "v2"): wanted}
    assert bool(hub.objects) != xet


def files_of(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def pushed(folder):
    require_page(PAGE)
    push_folder(folder, PAGE, private=False, revision="v2")


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        (
            "/api/whoami-v2",
            401,
            "does not know the token (401: Invalid user token",
        ),
        ("/api/repos/create", 403, "does not let this token write there"),
        ("/api/repos/create", 404, "has no such organisation, page or branch"),
        ("/api/models/someone/model/branch", 404, "check the name and --revision"),
        ("/api/models/someone/model/commit", 403, "give one that may write, or another page"),
        ("/api/validate-yaml", 400, "the test wants it"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, folder, path, status, says):
    hub.refusals[path] = status
    with pytest.raises(ConfigError) as caught:
        pushed(folder)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{PAGE}: ")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_hub_that_is_not_there_is_told(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9 cannot be reached; push again"):
        require_page(PAGE)


@pytest.mark.parametrize(
    ("page", "says"),
    [("model", "as ORG/NAME"), ("a/b/c", "no name of a page"), ("a/b c", "no name of a page")],
)
def test_a_page_is_an_organisation_and_a_name(hub, page, says):
    with pytest.raises(ConfigError, match=says):
        require_page(page)
    assert hub.asked == []


def test_nothing_is_pushed_where_the_hub_is_forbidden(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1 forbids"):
        require_page(PAGE)
