"""What Python code calls: a run, its figures and its model, as the command has them."""

import json
import sys
from pathlib import Path

import pytest

from tests.whole.small_run import ALONE, succeed, training_lines, words_for, write_settings

SCRIPT = """
import json, sys
import yaml
import mmscale
from mmscale.config.load import load_config
from mmscale.errors import ConfigError, DataError

folder, settings, *words = sys.argv[1:]
short = [*words, "train.duration=3 steps"]
run = mmscale.train(settings, *short, f"run.dir={folder}/file")
mapped = mmscale.train(yaml.safe_load(open(settings)), *short, f"run.dir={folder}/mapping")
config = load_config([settings, *short, f"run.dir={folder}/config"])
made = mmscale.train(config, "optim.lr=1e-4")
failures = {}
for name, word in {"setting": "optim.lr=-1", "data": f"data.train={folder}/nowhere"}.items():
    try:
        mmscale.train([settings, *short], word, f"run.dir={folder}/none")
    except (ConfigError, DataError) as error:
        failures[name] = type(error).__name__
longer = mmscale.train(settings, *words, "train.duration=5 steps", f"run.dir={folder}/file")
model, transform, tokenizer = longer.load()
rows = model.encode_text(tokenizer(["a red circle"]))
print(json.dumps({
    "losses": [[line["loss"] for line in one.metrics if "loss" in line]
               for one in (run, mapped, made, longer)],
    "figures": longer.figures,
    "again": mmscale.evaluate(longer.folder),
    "sets": mmscale.evaluate(longer.folder, sets={"held": {"data": config.data.eval}}),
    "failures": failures,
    "width": rows.shape[1],
}))
"""


@pytest.mark.slow
def test_a_run_in_python_is_the_commands(synthetic, tmp_path):
    settings = write_settings(tmp_path)
    words = words_for(synthetic, settings)[1:]
    done = succeed([sys.executable, "-c", SCRIPT, tmp_path, settings, *words])
    found = json.loads(done.stdout.splitlines()[-1])
    own: list[str | Path] = [
        *ALONE,
        settings,
        *words,
        "train.duration=5 steps",
        f"run.dir={tmp_path / 'own'}",
    ]
    succeed(own)
    losses = [line["loss"] for line in training_lines(tmp_path / "own")]
    from_file, from_mapping, slower, longer = found["losses"]
    assert from_file == from_mapping == losses[:3]
    assert longer == losses
    assert slower[0] == losses[0]
    assert slower[2] != losses[2]
    assert found["failures"] == {"setting": "ConfigError", "data": "DataError"}
    assert found["width"] == 32
    recalls = {name: value for name, value in found["again"].items() if "_r" in name}
    assert len(recalls) == 6
    for name, value in recalls.items():
        assert found["figures"][name] == pytest.approx(value)
    held = found["sets"]["held"]
    assert held.pop("mean") == pytest.approx(sum(recalls.values()) / 6)
    assert held == found["again"]
