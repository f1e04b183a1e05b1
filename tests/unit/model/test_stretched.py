"""Captions beyond a tower's table: short ones stay as they were, long ones are read to the end."""

import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import (
    BertTokenizerFast,
    CLIPTextConfig,
    CLIPTextModel,
    RobertaConfig,
    RobertaModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from mmscale.checkpoint.export import export
from mmscale.config.model import TextConfig
from mmscale.errors import ConfigError
from mmscale.model.stretched import stretch_hf, stretched
from mmscale.model.towers import build_text
from tests.unit.checkpoint.test_export import CLIP_VISION, exported
from tests.unit.model.tiny import save_bert

WORDS = [
    "a",
    "red",
    "dog",
    "runs",
    "under",
    "the",
    "large",
    "green",
    "square",
    "on",
    "two",
    "small",
]
WORDS += ["cats", "left", "of", "the", "circle"]
LONG = 33
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def openclip(**more):
    options = {"width": 32, "heads": 2, "layers": 2, "context_length": 24}
    words = {"name": "openclip:ViT-B-32", "weights": "random", "options": options, **more}
    return build_with_seed(words)


def build_with_seed(words):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower, tokens = build_text(TextConfig.model_validate(words))
    return tower.eval(), tokens


@pytest.fixture
def hugging_face(tmp_path):
    def save(kind):
        folder = save_bert(tmp_path / kind)
        if kind == "roberta":
            config = RobertaConfig(
                vocab_size=22,
                hidden_size=24,
                max_position_embeddings=26,
                pad_token_id=1,
                **SIZES,
            )
            RobertaModel(config).save_pretrained(folder)
        if kind == "clip":
            tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=24)
            tokenizer.save_pretrained(folder)
            ends = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
            words = {"vocab_size": 22, "hidden_size": 24, "max_position_embeddings": 24}
            CLIPTextModel(CLIPTextConfig(**words, **ends, **SIZES)).save_pretrained(folder)
        return f"hf:{folder}"

    return save


def of_captions(tower, tokens, captions):
    rows = [torch.tensor(row) for row in tokens.tokenize(captions)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokens.pad_token)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True).bool()
    with torch.no_grad():
        return tower(ids, mask), [len(row) for row in rows]


def assert_stretched(build):
    (before, was), (after, now) = build(), build(context_length=LONG)
    assert now.context_length == LONG
    short = [" ".join(WORDS[:2]), " ".join(WORDS[:5]), " ".join(WORDS)]
    wanted, lengths = of_captions(before, was, short)
    assert max(lengths) <= 20
    got, _ = of_captions(after, now, short)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    long = [" ".join([*WORDS, *WORDS[:12]]), " ".join([*WORDS, *WORDS[:11], "cat"])]
    got, lengths = of_captions(after, now, long)
    assert 24 < max(lengths) <= LONG
    # Its last word is read; the tower before cut it off.
    assert (got[0] - got[1]).abs().max() > 1e-4
    same, _ = of_captions(before, was, long)
    assert torch.equal(same[0], same[1])


def test_openclips_tower():
    assert_stretched(openclip)


@pytest.mark.parametrize("kind", ["roberta", "clip"])
def test_hugging_faces_towers(hugging_face, kind):
    name = hugging_face(kind)
    assert_stretched(lambda **more: build_with_seed({"name": name, **more}))


def test_the_first_rows_are_kept_and_the_rest_is_spread_from_end_to_end():
    table = torch.arange(30.0)[:, None] ** 2
    wide = stretched(table, 20 + 2 * 10 - 1)
    assert torch.equal(wide[:20], table[:20])
    torch.testing.assert_close(wide[20::2], table[20:])
    torch.testing.assert_close(wide[21::2], (table[20:-1] + table[21:]) / 2)
    assert torch.equal(stretched(table, 31, before=2)[:22], table[:22])


def test_a_tower_that_reads_whole_rows_is_refused():
    words = {"vocab_size": 22, "hidden_size": 24, "max_position_embeddings": 24}
    trunk = SiglipTextModel(SiglipTextConfig(**words, **SIZES))
    with pytest.raises(ConfigError, match="no table of positions that could be stretched"):
        stretch_hf(trunk, LONG, 24)
    options = {"width": 32, "heads": 2, "layers": 1, "context_length": 24, "no_causal_mask": True}
    with pytest.raises(ConfigError, match="reads whole rows"):
        openclip(options=options, context_length=LONG)
    with pytest.raises(ConfigError, match="leaves none to stretch"):
        openclip(
            options=options | {"no_causal_mask": False, "context_length": 16}, context_length=40
        )


@pytest.fixture
def small_clip(tmp_path):
    """A small architecture among OpenCLIP's own."""
    text = {"width": 32, "heads": 2, "layers": 2, "context_length": 24, "vocab_size": 49408}
    vision = CLIP_VISION["options"] | {"image_size": 32}
    content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small-clip.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)
    yield "small-clip"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    del open_clip.factory._MODEL_CONFIGS["small-clip"]


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_exported_as_long_as_it_is(tmp_path, small_clip, whole):
    text = {"context_length": LONG}
    if whole:
        model = {"preset": f"openclip:{small_clip}", "text": text}
    else:
        options = {"width": 32, "heads": 2, "layers": 2, "context_length": 24}
        name = {"name": "openclip:ViT-B-32", "weights": "random", "options": options}
        model = {"vision": CLIP_VISION, "text": name | text, "embed_dim": 16}
    what = exported(tmp_path / "out", model)
    export(what, "open_clip")
    theirs = open_clip.create_model(f"local-dir:{what.out}").eval()
    assert theirs.context_length == LONG
    caption = " ".join([*WORDS, *WORDS[:12]])
    ids = open_clip.get_tokenizer(f"local-dir:{what.out}")([caption])
    assert int((ids > 0).sum()) > 24
    own = what.spec.tokenize([caption])[0]
    assert own[-1] == SimpleTokenizer().eot_token_id
    got = theirs.encode_text(ids, normalize=True)
    wanted = what.encoder.encode_text(torch.tensor([own]), normalize=True)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
