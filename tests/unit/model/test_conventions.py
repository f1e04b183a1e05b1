"""How a model's folder says that it wants to be used is obeyed or refused, never passed over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    ViTImageProcessor,
)

from mmscale.config.model import ModelConfig, TextConfig, VisionConfig
from mmscale.data.caption_text import unknown_words
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from mmscale.model.inputs import join_inputs
from mmscale.model.registry import describe_tower
from mmscale.model.registry_measure import measure
from mmscale.model.towers import build_text, build_vision
from mmscale.parallel.device import FAILING_TOWERS
from mmscale.parallel.peers import Alone
from tests.unit.model.test_foreign import TEXT_CFG, change, save_openclip
from tests.unit.model.tiny import WORDS, padded

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")


@pytest.mark.parametrize("config", [True, False])
def test_a_folder_copied_without_its_tokenizer_is_refused(bert_folder, config):
    for file in bert_folder.iterdir():
        if file.name in TOKENIZER_FILES or (config and "token" in file.name):
            file.unlink()
    with pytest.raises(ConfigError, match=r"lacks the files of its tokenizer \(vocab.txt"):
        build_text(TextConfig(name=f"hf:{bert_folder}"))


@pytest.mark.parametrize("lacking", ["vocab.json", "merges.txt", "both"])
def test_half_a_byte_pair_tokenizer_is_refused(tmp_path, lacking):
    words = {letter: place for place, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
    (tmp_path / "vocab.json").write_text(json.dumps({**words, "<|endoftext|>": 27, "at": 28}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t\n")
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2Model(GPT2Config(vocab_size=29, **config)).save_pretrained(tmp_path)
    _, text = build_text(TextConfig(name=f"hf:{tmp_path}"))
    assert text.tokenize(["cat"]) == [[2, 28]]
    for file in ("vocab.json", "merges.txt"):
        if lacking in (file, "both"):
            (tmp_path / file).unlink()
    # With one of them gone the library itself refuses.
    named = "lacks the files of its tokenizer" if lacking == "both" else "its tokenizer"
    with pytest.raises(ConfigError, match=named):
        build_text(TextConfig(name=f"hf:{tmp_path}"))


def test_a_tokenizer_without_a_vocabulary_needs_no_file(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    _, text = build_text(TextConfig(name=f"hf:{tmp_path}"))
    assert len(text.tokenize(["abc"])[0]) == 4


def test_a_tokenizer_far_smaller_than_the_table_is_refused(bert_folder):
    BertModel(BertConfig(vocab_size=500, intermediate_size=16, **TINY)).save_pretrained(bert_folder)
    with pytest.raises(ConfigError, match="has 22 tokens and the model embeds 500"):
        build_text(TextConfig(name=f"hf:{bert_folder}"))


@pytest.mark.parametrize("whole", [True, False])
def test_an_openclip_folder_without_its_tokenizer_is_refused(tmp_path, bert_folder, whole):
    folder = save_openclip(
        tmp_path / "clip", {**TEXT_CFG, "vocab_size": 22, "hf_tokenizer_name": "x"}
    )
    BertConfig(vocab_size=22).save_pretrained(folder)
    name = f"openclip:local-dir:{folder}"

    def build():
        if whole:
            return build_model(ModelConfig(preset=name, embed_dim=16), None, 0)
        return build_text(TextConfig(name=name, weights="random"))

    with pytest.raises(ConfigError, match="lacks the files of its tokenizer"):
        build()
    shutil.copy(bert_folder / "vocab.txt", folder)
    build()
    save_openclip(folder, {**TEXT_CFG, "vocab_size": 900, "hf_tokenizer_name": "x"})
    with pytest.raises(ConfigError, match="has 22 tokens and the model embeds 900"):
        build()


@pytest.mark.parametrize("end", [2, 3, 21])
def test_a_clip_that_pools_at_its_end_token_needs_a_tokenizer_that_gives_it(bert_folder, end):
    config = CLIPTextConfig(
        vocab_size=22, intermediate_size=16, max_position_embeddings=32, eos_token_id=end, **TINY
    )
    (bert_folder / "model.safetensors").unlink()
    CLIPTextModel(config).save_pretrained(bert_folder)
    if end == 3:  # [SEP], with which this tokenizer ends
        tower, text = build_text(TextConfig(name=f"hf:{bert_folder}"))
        assert tower.pooling == "model"
        rows = text.tokenize(["a red dog", "a dog"])
        assert rows[0][-1] == 3
        # Padding behind the end is out of reach, so that a card is given no mask at all.
        tokens, mask = padded(rows, 7, text.pad_token)
        assert tower.ready(mask) is None
        pooled = tower.eval()(tokens, mask)
        unmasked = tower.trunk(input_ids=tokens, attention_mask=None).pooler_output
        torch.testing.assert_close(unmasked, pooled, rtol=0, atol=1e-6)
        return
    with pytest.raises(ConfigError, match=r"pools at its end token.*model\.text\.pooling"):
        build_text(TextConfig(name=f"hf:{bert_folder}"))
    build_text(TextConfig(name=f"hf:{bert_folder}", pooling="mean"))


def test_a_projection_of_sentence_transformers_is_not_left_out_unasked(bert_folder):
    (bert_folder / "1_Pooling").mkdir()
    change(bert_folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    modules = [{"type": f"sentence_transformers.models.{k}"} for k in ("Transformer", "Pooling")]
    file = bert_folder / "modules.json"
    file.write_text(json.dumps(modules))
    assert build_text(TextConfig(name=f"hf:{bert_folder}"))[0].pooling == "mean"
    file.write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ConfigError, match="has a Dense above its pooling"):
        build_text(TextConfig(name=f"hf:{bert_folder}"))
    assert build_text(TextConfig(name=f"hf:{bert_folder}", pooling="cls"))[0].pooling == "cls"


def test_another_image_size_than_the_position_table_is_named(tmp_path):
    # Of a type whose table is not interpolated.
    deit = DeiTConfig(image_size=64, patch_size=8, intermediate_size=16, **TINY)
    DeiTModel(deit).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    config = VisionConfig(name=f"hf:{tmp_path}")
    assert build_vision(config, 64)[1].image_size == build_vision(config, None)[1].image_size == 64
    with pytest.raises(ConfigError, match=r"data\.image_size=32.*64 pixels.*image_size=64"):
        build_vision(config, 32)
    with pytest.raises(ConfigError, match=r"data\.image_size=32.*64 pixels"):
        build_vision(VisionConfig(name=config.name, options={"image_size": 32}), None)
    random = config.model_copy(update={"weights": "random"})
    assert build_vision(random, 32)[1].image_size == 32


def test_a_weights_file_for_another_image_size_is_named_too(tmp_path):
    options = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 8}
    clip = VisionConfig(name="openclip:ViT-B-32", weights="random", options=options)
    tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    timm = VisionConfig(name="timm:vit_tiny_patch16_224", weights="random", options=tiny)
    for config in (clip, timm):
        tower, _ = build_vision(config, 224)
        file = tmp_path / "weights.safetensors"
        save_file({n: t.contiguous() for n, t in tower.trunk.state_dict().items()}, file)
        filled = config.model_copy(update={"weights": str(file)})
        assert build_vision(filled, 224)
        with pytest.raises(ConfigError, match=r"data\.image_size=32.*224 pixels"):
            build_vision(filled, 32)
    other = filled.model_copy(update={"options": {**tiny, "embed_dim": 16}})
    with pytest.raises(CheckpointError):
        build_vision(other, 32)


def test_unknown_words_are_counted_and_most_of_them_refused(bert_folder):
    _, text = build_text(TextConfig(name=f"hf:{bert_folder}"))
    _, image = build_vision(VisionConfig(name="timm:test_convnext", weights="random"), 32)
    spec = join_inputs(image, text)

    def line(*captions: str):
        return unknown_words(spec, spec.tokenize(captions) if captions else [], Alone())

    assert spec.unknown_token == 1
    assert line(*WORDS) is None
    assert "10% of the captions' tokens" in line("a red dog sits on the large", "red two xylophone")
    assert "50%" in line("a dog", "un chien")
    assert "67%" in line("un chien rouge", "a cat sits", "un chien court")
    with pytest.raises(ConfigError, match=r"model\.text\.name.*92%"):
        line("un petit chien rouge court", "un autre chien", "une maison", "deux left")
    assert line() is None
    assert line("", "") is None


def test_a_half_of_a_clip_says_that_its_projection_is_left_out(tmp_path, bert_folder):
    half = {**TINY, "intermediate_size": 16}
    text = {**half, "vocab_size": 22, "eos_token_id": 3, "max_position_embeddings": 32}
    vision = {**half, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    (bert_folder / "model.safetensors").unlink()
    CLIPModel(config).save_pretrained(bert_folder)
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(bert_folder)
    name = f"hf:{bert_folder}"
    for tower, _ in (
        build_vision(VisionConfig(name=name), None),
        build_text(TextConfig(name=name)),
    ):
        assert "one half of a clip model: its projection of 12" in tower.left_out
    alone, _ = build_vision(VisionConfig(name="timm:test_convnext", weights="random"), 32)
    assert alone.left_out is None


def test_the_figures_of_a_folder_say_that_it_lacks_its_tokenizer(bert_folder):
    [whole] = measure(f"hf:{bert_folder}")
    assert whole.fault is None
    for file in TOKENIZER_FILES:
        (bert_folder / file).unlink(missing_ok=True)
    [found] = measure(f"hf:{bert_folder}")
    assert found.width == whole.width
    assert "lacks the files of its tokenizer" in found.fault
    assert "cannot be trained" in describe_tower(found, FAILING_TOWERS)
    assert "fault" in found.to_json()
    assert "fault" not in whole.to_json()
