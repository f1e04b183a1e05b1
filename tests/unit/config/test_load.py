"""A wrong word is one sentence with the path, the rule and the repair."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.config.deepspeed import fill, read_deepspeed
from mmscale.config.explain import KINDS, known_settings
from mmscale.config.load import load_config, overridden, parse_scalar, validate
from mmscale.config.values import Duration
from mmscale.errors import ConfigError

MINIMAL = {"data": {"train": "shards"}}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.epochs=3"], ["train.epochs is not a setting", "train.duration='3 epochs'"]),
        (["data.batchsize=64"], ["data.batchsize", "train.global_batch_size"]),
        (["optim.lr=abc"], ["optim.lr='abc'", "a number", "optim.lr=0.0005"]),
        (["trian.duration=3 steps"], ["trian.duration is not", "did you mean train.duration"]),
        (["data.lanez=3"], ["data.lanez", "did you mean data.lanes"]),
        (["data.lanes=x"], ["data.lanes='x'", "'auto' or a whole number"]),
        (["optim.lr=-1"], ["optim.lr=-1", "greater than 0"]),
        (["train.duration=5"], ["train.duration=5", "with its unit"]),
        (["loss.terms=[{kind: foo}]"], ["loss.terms.0", "infonce"]),
        (["--lr=3"], ["--lr=3", "key=value"]),
        (["nowhere.yaml"], ["nowhere.yaml", "neither a file nor a preset"]),
        (["dmeo"], ["dmeo", "did you mean demo"]),
        (["data.feature_cache=x", "data.augment=none"], ["data.feature_cache", "frozen"]),
        (
            ["engine.kind=accelerate", "engine.deepspeed=ds_configs/zero1.json"],
            ["engine.kind=accelerate contradicts"],
        ),
        (["data.crop_scale=[0.9,0.2]"], ["data.crop_scale", "must rise"]),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_with_its_repair(words, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(["demo", *words])
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def _numbers() -> list[str]:
    """Every setting whose type has a float in it, with those of terms."""
    takes = [path for path, field in known_settings().items() if "float" in str(field.annotation)]
    terms = [
        f"loss.terms=[{{kind: {kind}, {name}: VALUE}}]"
        for kind, term in KINDS.items()
        for name, field in term.model_fields.items()
        if "float" in str(field.annotation) or "Ramp" in str(field.annotation)
    ]
    ramps = [path for path, field in known_settings().items() if "Ramp" in str(field.annotation)]
    ramped = [f"{path}={{from: VALUE, to: 1, over: 3 steps}}" for path in ramps]
    options = ["model.vision.options={drop: {rate: VALUE}}", "optim.options={betas: [VALUE]}"]
    plain = [f"{path}=VALUE" for path in (*takes, *ramps)]
    return [*plain, *ramped, *terms, *options]


def test_the_list_of_numeric_settings_reaches_lists_and_unions():
    assert {"optim.lr=VALUE", "data.crop_scale=VALUE", "model.logit_scale.course=VALUE"} < set(
        _numbers()
    )


@pytest.mark.parametrize("word", _numbers())
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "1e300", "inf", "nan"])
def test_infinite_and_nan_numbers_are_refused_by_every_setting(word, value):
    if value in ("inf", "nan") and ".options=" in word:
        # There it is text, and the constructor's own business.
        return
    with pytest.raises(ConfigError) as caught:
        load_config(["demo", word.replace("VALUE", value)])
    assert word.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("value", ["1e999 steps", "9e999 epochs", "1e300 samples"])
def test_durations_beyond_the_limit_are_refused(value):
    with pytest.raises(ConfigError, match="must be at most 1e"):
        load_config(["demo", f"train.duration={value}"])


@pytest.mark.parametrize(
    "word",
    [
        "data.eval=[a, 3]",
        "data.eval={a: null}",
        "data.crop_scale=x",
        "stages=[3]",
        "loss.terms=[3]",
        "model={text: [1]}",
        "run.seed=null",
        "data.train=[{shards: [3, null]}]",
        "optim.lr_scale={vision: [2]}",
        "data.hard_batches.share={from: true}",
    ],
)
def test_messages_show_values_as_yaml_and_not_as_python(word):
    """Neither Python's way of writing a value nor a name of its types is in a message."""
    with pytest.raises(ConfigError) as refused:
        load_config(["demo", "data.train=x", word])
    told = str(refused.value)
    assert not re.search(r"None|True|\['|\{'|tuple|dictionary|instance|Config|\(0\.", told), told


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(["demo", "optim.lr=abc", "train.epochs=3", "data.workers=-1"])
    assert len(str(caught.value).splitlines()) == 3


def test_loading_without_a_config_lists_the_presets():
    with pytest.raises(ConfigError, match=r"demo.*flickr8k"):
        load_config([])


def test_scalars_are_read_as_yaml_1_2_reads_them():
    assert parse_scalar("3e-4") == 3e-4
    assert parse_scalar("1e5") == 1e5
    assert parse_scalar("off") == "off"
    assert parse_scalar("no") == "no"
    assert parse_scalar("true") is True
    assert parse_scalar("null") is None
    assert parse_scalar("300 steps") == "300 steps"
    assert load_config(["demo", "optim.lr=3e-4"]).optim.lr == 3e-4
    assert load_config(["demo", "log.wandb=off"]).log.wandb == "off"


def test_later_words_win_and_launcher_flags_are_ignored(tmp_path):
    first = tmp_path / "first.yaml"
    first.write_text("data: {train: a, workers: 3}\noptim: {lr: 1e-3}\n")
    config = load_config(["--local_rank=1", str(first), "optim.lr=2e-3"])
    assert (config.data.train, config.data.workers, config.optim.lr) == ("a", 3, 2e-3)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("data: {train: a}\ndata: {train: b}\n")
    with pytest.raises(ConfigError, match="twice"):
        load_config([str(path)])


def test_yaml_cannot_build_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("data: !!python/object/apply:os.system ['touch /tmp/pwned']\n")
    with pytest.raises(ConfigError, match="constructor"):
        load_config([str(path)])


def test_a_dump_reads_back_as_itself():
    config = load_config(["demo"])
    assert validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "steps"),
    [("300 steps", 300), ("2 epochs", 20), ("0.25 epochs", 3), ("1k samples", 16), ("1 step", 1)],
)
def test_a_duration_is_parsed_converted_to_steps_and_written_back(text, steps):
    duration = Duration.parse(text)
    assert duration.steps(steps_per_epoch=10, global_batch_size=64) == steps
    assert Duration.parse(str(duration)) == duration


def test_a_wrong_setting_is_reported_without_importing_torch():
    code = (
        "import sys; from mmscale.train import main; code = main(['demo', 'optim.lr=abc']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optim.lr" in done.stderr


def test_deepspeed_contradictions_name_both_values():
    with pytest.raises(ConfigError, match=r"gradient_clipping=5 contradicts the run's 1\.0"):
        fill({"gradient_clipping": 5}, {"gradient_clipping": 1.0}, "x.json")
    assert fill({"a": {"b": "auto"}}, {"a.b": 3}, "x.json") == {"a": {"b": 3}}


def test_deepspeed_file_is_found_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed("ds_configs/zero2.json")["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match="no such file"):
        read_deepspeed("ds_configs/zero9.json")
    bad = tmp_path / "zero0.json"
    bad.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(ConfigError, match="must be 1, 2 or 3"):
        read_deepspeed(str(bad))


def test_a_trained_run_accepts_overrides_of_places_device_and_workers_only():
    run = load_config(["demo", "data.train=a", "data.eval=b", "data.feature_cache=null"])
    told = overridden(
        run, ["model.text.name=hf:~/m", "data.eval=[c, d]", "engine.device=cpu", "data.workers=0"]
    )
    assert told.model.text.name == f"hf:{Path.home()}/m"
    assert (told.data.eval, told.engine.device, told.data.workers) == (["c", "d"], "cpu", 0)
    assert overridden(run, []) == run
    for word in (
        "model.embed_dim=3",
        "model.text.weights=x",
        "model={text: {name: x}}",
        "data={eval: x}",
        "data.allow_pipe=true",
        "run.dir=x",
        "optim.lr=3",
        "demo",
        "--lr",
    ):
        with pytest.raises(ConfigError, match=re.escape(word.partition("=")[0])):
            overridden(run, [word])
    with pytest.raises(ConfigError, match=r"engine\.device='tpu'"):
        overridden(run, ["engine.device=tpu"])


@pytest.mark.parametrize(
    ("word", "setting"),
    [("--lr", "optim.lr"), ("--train-data", "data.train"), ("--epochs=3", "train.duration")],
)
def test_options_of_other_trainers_name_the_setting(word, setting):
    with pytest.raises(ConfigError, match=f"^{word}: no such option; .* {setting}=VALUE"):
        load_config(["demo", word])


def test_an_empty_mapping_takes_away_what_an_earlier_word_gave(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "data: {train: x}\ntrain: {global_batch_size: 8}\n"
        "model: {vision: {options: {depths: [1], dims: [2]}}}\n"
    )
    more = load_config([str(path), "model.vision.options.dims=[3]"]).model.vision.options
    assert more == {"depths": [1], "dims": [3]}
    assert load_config([str(path), "model.vision.options={}"]).model.vision.options == {}
