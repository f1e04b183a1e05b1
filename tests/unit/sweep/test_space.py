import pytest
import yaml

from mmscale.errors import ConfigError
from mmscale.sweep.space import read_search_space

SPACE = {
    "base": ["demo", "data.train=somewhere"],
    "parameters": {
        "optim.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2},
        "model.embed_dim": {"kind": "int", "low": 16, "high": 64, "step": 16},
        "loss.preset": {"kind": "choice", "values": ["clip", "siglip"]},
        "optim.weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.5},
    },
    "trials": 4,
}


@pytest.fixture
def refused(tmp_path):
    """What is said about the search above with some entries changed."""

    def say(**changes) -> str:
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump({**SPACE, **changes}))
        with pytest.raises(ConfigError) as caught:
            read_search_space(path)
        return str(caught.value)

    return say


def test_a_search_is_read_and_its_values_become_words(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    space = read_search_space(path)
    assert (space.metric, space.direction) == ("eval/mean", "maximize")
    choices = space.parameters["loss.preset"].texts
    words = space.words({"optim.lr": 1e-3, "loss.preset": choices[1]})
    assert words == (*SPACE["base"], "optim.lr=0.001", 'loss.preset="siglip"')


KINDS_OF_HEAD = {
    "model.head.kind": {"kind": "choice", "values": ["linear", "mlp"]},
    "model.head.hidden": {"kind": "int", "low": 16, "high": 64},
}


def test_a_trial_is_spared_what_its_other_values_leave_without_effect(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**SPACE, "parameters": KINDS_OF_HEAD}))
    space = read_search_space(path)
    deep = space.words({"model.head.kind": "mlp", "model.head.hidden": 32})
    flat = space.words({"model.head.kind": "linear", "model.head.hidden": 32})
    assert deep == (*SPACE["base"], "model.head.kind=mlp", "model.head.hidden=32")
    assert flat == (*SPACE["base"], "model.head.kind=linear")


def test_a_search_for_what_no_trial_reads_is_refused(refused):
    said = refused(parameters={"model.head.hidden": KINDS_OF_HEAD["model.head.hidden"]})
    assert "parameters.model.head.hidden has no effect in any trial" in said


def test_an_unknown_key_is_told_with_its_neighbour(refused):
    assert "space.yaml: trails is no key here; did you mean trials?" in refused(trails=3)
    assert "pruning.after_trial is no key" in refused(pruning={"after_trial": 1})
    unknown = {"optim.lr": {"kind": "uniform", "low": 0.1, "high": 1.0, "hihg": 1.0}}
    assert "parameters.optim.lr.hihg is no key here; did you mean high?" in refused(
        parameters=unknown
    )


def test_a_setting_that_does_not_exist_is_told_as_training_tells_it(refused):
    unknown = {"optim.lrr": {"kind": "uniform", "low": 0.1, "high": 1.0}}
    assert "optim.lrr is not a setting; did you mean optim.lr?" in refused(parameters=unknown)


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"kind": "uniform", "low": 1.0, "high": 0.1}, "low=1.0 must be below high=0.1"),
        ({"kind": "log_uniform", "low": 0.0, "high": 0.1}, "greater than 0"),
        ({"kind": "normal", "low": 0.0, "high": 0.1}, "must say its kind, one of log_uniform"),
        ({"kind": "uniform", "low": 0.0}, "high is missing"),
        ({"kind": "uniform", "low": -1.0, "high": 0.1}, "optim.lr=-1.0 must be"),
    ],
)
def test_a_range_that_cannot_be_is_told(refused, parameter, said):
    assert said in refused(parameters={"optim.lr": parameter})


def test_every_fault_is_told_at_once(refused):
    said = refused(trials=0, direction="up", base=[])
    assert len(said.splitlines()) == 3
    assert "trials=0" in said
