"""The ablation of a recipe: every row loads, and rows differ in what they say."""

from mmscale.config.load import load_config, stage_config
from mmscale.config.staging import expanded
from mmscale.lab.cells import Result
from mmscale.lab.lab_recipe import cells, page

WORDS = ("flickr8k_finetune", "train.duration=8 epochs", "data.feature_cache=features")


def test_every_row_is_a_run_of_the_same_length():
    rows = {cell.labels["recipe"]: load_config(cell.words) for cell in cells(WORDS, [0])}
    assert list(rows)[:5] == [
        "heads only",
        "+ fine-tune",
        "+ layer-wise decay",
        "+ stages",
        "+ queue",
    ]
    assert {str(config.train.duration) for config in rows.values()} == {"8 epochs"}
    assert len({config.model_dump_json() for config in rows.values()}) == len(rows)
    heads, tuned = rows["heads only"], rows["+ fine-tune"]
    assert stage_config(heads, 0).data.feature_cache == "features"
    assert (tuned.data.feature_cache, tuned.optim.layer_decay.text) == (None, 1)
    assert rows["+ layer-wise decay"].optim.layer_decay.text < 1
    staged = expanded(rows["+ stages"])
    assert [str(stage.duration) for stage in staged] == ["4 epochs", "4 epochs"]
    assert stage_config(rows["+ stages"], 1).data.feature_cache is None
    for name in list(rows)[4:]:
        assert expanded(rows[name]) == staged


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
