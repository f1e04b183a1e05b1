"""The ablation of a recipe: every row loads, and rows differ in what they say."""

import pytest

from mmscale.config.load import load_config, stage_config
from mmscale.config.rules import expanded_stages
from mmscale.errors import ConfigError
from tools.studies.cells import Result
from tools.studies.recipe import DEFAULTS, cells, page

WORDS = ("flickr8k_finetune", "data.feature_cache=features")


def test_every_row_adds_its_part():
    rows = {cell.labels["recipe"]: load_config(cell.words) for cell in cells(WORDS, [0])}
    names = list(rows)
    assert names[:7] == [
        "heads only",
        "+ fine-tune",
        "+ layer-wise decay",
        "+ stages",
        "+ canonical heads",
        "+ dropout",
        "+ chunked batch 1,024",
    ]
    assert len({config.model_dump_json() for config in rows.values()}) == len(rows)
    heads, tuned, layered, staged, canonical, recipe, large = (rows[name] for name in names[:7])
    assert [str(stage.duration) for stage in expanded_stages(heads)] == [str(recipe.train.duration)]
    assert stage_config(heads, 0).data.feature_cache == "features"
    assert (tuned.data.feature_cache, tuned.optim.layer_decay.text) == (None, 1)
    assert (layered.optim.layer_decay.text, recipe.optim.layer_decay.text) == (0.8, 1)
    assert stage_config(layered, 0).optim.lr_scale.head == 1
    assert stage_config(staged, 0).optim.lr == 1e-3
    assert stage_config(staged, 1).optim == stage_config(recipe, 1).optim
    assert (staged.model.head.init, canonical.model.head.init) == ("normal", "cca")
    assert (canonical.model.head.dropout, recipe.model.head.dropout) == (0, 0.5)
    assert recipe == load_config([*WORDS, *DEFAULTS])
    assert stage_config(recipe, 1).data.feature_cache is None
    for name in names[7:]:
        assert expanded_stages(rows[name]) == expanded_stages(recipe)
    assert expanded_stages(large)[1].global_batch_size == 1024
    assert expanded_stages(large)[1].micro_batch_size == 64


def test_a_recipe_s_own_layer_wise_decay_stands_from_its_row_on():
    given = (*WORDS, "optim.layer_decay={vision: 0.7, text: 0.6}")
    rows = {cell.labels["recipe"]: load_config(cell.words) for cell in cells(given, [0])}
    decays = [config.optim.layer_decay.text for config in rows.values()]
    assert decays[1:] == [1] + [0.6] * (len(decays) - 2)


def test_towers_see_as_many_pairs_in_each_row():
    towers = expanded_stages(load_config(WORDS))[1].duration
    for cell in cells(WORDS, [0])[1:]:
        assert expanded_stages(load_config(cell.words))[-1].duration == towers


def test_a_recipe_has_two_stages():
    with pytest.raises(ConfigError, match=r"has 0 stages; give it two"):
        cells(("flickr8k",), [0])


def test_the_page_has_a_line_for_each_row_with_its_words_and_minutes():
    results = [
        Result(cell.labels, cell.words, 90.0, {"eval/mean": 40.0 + cell.labels["seed"]})
        for cell in cells(WORDS, [0, 1])
    ]
    text = page(results)
    assert "| heads only | failed | failed | 40.5 ± 0.7 | 1.5 ± 0.0 |" in text
    assert "- + queue: `" in text
    assert "negatives.queue.size=4096" in text
    assert "run.seed" not in text
