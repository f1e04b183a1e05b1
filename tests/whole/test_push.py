"""`mmscale push` against a hub on loopback: what arrives is loaded by the library it is for."""

import json
import sys
from pathlib import Path

import pytest
import torch

import mmscale
from tests.hub import TOKEN, running_hub
from tests.unit.model.tiny import save_bert
from tests.unit.model.whole_hf import save_whole
from tests.whole.command import explain, run
from tests.whole.small_run import ALONE, metrics, succeed, words_for, write_settings

PAGE = "someone/small-pairs"
TIMM = {"vision": {"name": "timm:test_convnext", "weights": "random"}, "embed_dim": 16}
CAPTION = "a red dog runs"


def trained(synthetic, folder: Path, *model: str) -> Path:
    """A run of two updates whose towers lie in `folder`."""
    settings = write_settings(folder)
    text = settings.read_text("utf-8")
    beginning, _, rest = text.partition("model:\n")
    settings.write_text(beginning + rest[rest.index("train:") :], "utf-8")
    words = [*words_for(synthetic, settings), "train.duration=2 steps", *model]
    succeed([*ALONE, *words, f"run.dir={folder / 'run'}"])
    return folder / "run"


def written(hub, folder: Path) -> Path:
    """What the page holds, as files."""
    for name, content in hub.files[PAGE, "main"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_says_nothing_of(folder: Path, *places: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            told = [place for place in places if str(place).encode() in content]
            assert not told, f"{file.name} names {told}"


def test_without_a_token_nothing_is_asked(tmp_path):
    (tmp_path / "run").mkdir()
    with running_hub() as hub:
        env = {**hub.environment(tmp_path / "cache"), "HF_TOKEN": ""}
        done = run(["mmscale", "push", tmp_path / "run", PAGE], env=env)
    assert done.returncode == 2, explain(done)
    assert "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.asked == []
    assert TOKEN not in done.stderr


_LOADS = {
    "open_clip": """
import open_clip
model = open_clip.create_model("hf-hub:{page}").eval()
tokens = open_clip.get_tokenizer("hf-hub:{page}")([caption])
row = model.encode_text(tokens, normalize=True)""",
    "clip": """
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("{page}").eval()
tokens = AutoTokenizer.from_pretrained("{page}")([caption], return_tensors="pt")
row = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output)""",
    "sentence_transformers": """
from sentence_transformers import SentenceTransformer
row = torch.from_numpy(SentenceTransformer("{page}", device="cpu").encode([caption]))""",
}


@pytest.fixture(scope="module")
def pair(synthetic, tmp_path_factory) -> Path:
    """The folder of a run with towers of timm and Hugging Face."""
    folder = tmp_path_factory.mktemp("pair")
    model = json.dumps({**TIMM, "text": {"name": f"hf:{save_bert(folder / 'bert')}"}})
    return trained(synthetic, folder, f"model={model}", "model.text.weights=random")


def assert_loads(hub, to: str, folder: Path, tmp_path: Path) -> None:
    """Another process that knows the page only embeds a caption as the run does."""
    code = f"""
import sys, torch
caption, out = sys.argv[1:]
torch.set_grad_enabled(False)
{_LOADS[to].format(page=PAGE)}
torch.save(row, out)"""
    row, env = tmp_path / "row.pt", hub.environment(tmp_path / "other")
    succeed([sys.executable, "-c", code, CAPTION, row], env=env)
    encoder, _, tokenizer = mmscale.load(folder)
    with torch.no_grad():
        ours = encoder.encode_text(tokenizer([CAPTION]), normalize=True)
    torch.testing.assert_close(torch.load(row), ours, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card(pair, synthetic, tmp_path):
    with running_hub() as hub:
        hub.large = (".safetensors",)
        words = ["mmscale", "push", pair, PAGE, "--private", "--license", "apache-2.0"]
        # Without it, large files go to a store of another protocol, which this hub has not.
        env = {**hub.environment(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = succeed(words, env=env)
        assert_loads(hub, "open_clip", pair, tmp_path)
    assert done.stdout == f"open_clip files at {hub.endpoint}/{PAGE}\n"
    assert hub.pages == {PAGE: "private"}
    assert hub.objects, "weights go by Git LFS"
    got = written(hub, tmp_path / "got")
    assert_says_nothing_of(got, pair, tmp_path, Path(synthetic.train).parent, Path.home())

    card = (got / "README.md").read_text()
    evaluated = [line for line in metrics(pair) if "eval/i2t_r1" in line][-1]
    assert card.startswith("---\nlibrary_name: open_clip\nlicense: apache-2.0\n")
    assert f'create_model_and_transforms("hf-hub:{PAGE}")' in card
    row = [f"{evaluated[f'eval/i2t_r{k}']:.1f}" for k in (1, 5, 10)]
    found = next(line for line in card.splitlines() if line.startswith("| image to"))
    assert [cell.split()[0] for cell in found.split("|")[2:-1]] == row
    for told in ("24 images", "after 2 updates", "| pairs seen | 32 |", "| objective | infonce |"):
        assert told in card
    assert "timm:test_convnext (random weights)" in card


@pytest.mark.slow
@pytest.mark.parametrize("to", ["clip", "sentence_transformers"])
def test_a_page_is_loaded_by_its_name(synthetic, tmp_path, to, request):
    if to == "clip":
        save_whole(tmp_path / "clip", "clip")
        folder = trained(synthetic, tmp_path, f"model.preset=hf:{tmp_path / 'clip'}")
    else:
        pytest.importorskip("sentence_transformers", reason="the extra is not installed")
        folder = request.getfixturevalue("pair")
    with running_hub() as hub:
        env = hub.environment(tmp_path / "cache")
        succeed(["mmscale", "push", folder, "--repo", PAGE, "--to", to], env=env)
        got = written(hub, tmp_path / "got")
        assert_says_nothing_of(got, folder.parent, tmp_path, Path.home())
        assert_loads(hub, to, folder, tmp_path)
