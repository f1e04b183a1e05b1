"""The objective's settings: named lists, what they fill, and what is said of a mistake."""

import pytest

from mmscale.config.load import validate
from mmscale.config.loss import OBJECTIVES
from mmscale.errors import ConfigError


def config(**loss):
    return validate({"data": {"train": "unused"}, "loss": loss})


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"mixed"}))
def test_a_named_objective_fills_the_terms_and_survives_being_written(name):
    read = config(preset=name)
    assert [term.kind for term in read.loss.terms] == [term["kind"] for term in OBJECTIVES[name]]
    assert validate(read.model_dump(mode="json")) == read


def test_the_presets_simple_and_mixed_have_their_documented_terms():
    simple = {term.kind: term.weight.last for term in config(preset="simple").loss.terms}
    assert simple == {"infonce": 1, "regression": 0.5, "decorrelation": 0.2}
    mixed = {term["kind"] for term in OBJECTIVES["mixed"]}
    assert mixed == {
        "infonce",
        "decorrelation",
        "hinge",
        "diversity",
        "matching",
        "classification",
    }


def test_siglip_starts_from_its_authors_scale_and_bias_unless_they_are_set():
    scale = config(preset="siglip").model.logit_scale
    assert (scale.init, scale.bias) == (10, -10)
    assert config().model.logit_scale.bias is None
    own = {"model": {"logit_scale": {"init": 20, "bias": -2.71}}}
    read = validate({"data": {"train": "unused"}, "loss": {"preset": "siglip"}, **own})
    assert (read.model.logit_scale.init, read.model.logit_scale.bias) == (20, -2.71)
    own = {"model": {"logit_scale": {"bias": None}}}
    with pytest.raises(ConfigError, match=r"model\.logit_scale\.bias is null"):
        validate({"data": {"train": "unused"}, "loss": {"preset": "siglip"}, **own})


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ([], "at least one term"),
        ([{"kind": "infonc"}], r"loss\.terms\.0\.kind='infonc' .* did you mean infonce\?"),
        ([{"weight": 1}], r"loss\.terms\.0\.kind=null must be one of infonce"),
        (
            [{"kind": "infonce"}, {"kind": "hinge", "margn": 1}],
            r"loss\.terms\.1\.margn is no option of hinge .* did you mean margin\?",
        ),
        ([{"kind": "hinge", "margin": "x"}], r"loss\.terms\.0\.margin='x' must be a number"),
        ([{"kind": "infonce", "weight": -1}], r"loss\.terms\.0\.weight=-1 must be at least 0"),
        (["infonce"], r"loss\.terms\.0"),
        (3, r"loss\.terms=3"),
    ],
)
def test_an_error_in_a_term_names_its_index_and_the_repair(terms, said):
    with pytest.raises(ConfigError, match=said):
        config(terms=terms)


def test_a_preset_given_with_other_terms_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.preset=siglip"):
        config(preset="siglip", terms=[{"kind": "infonce"}])


def test_terms_that_need_fusion_say_so():
    with pytest.raises(ConfigError, match=r"model\.fusion\.classes"):
        config(preset="mixed")
    off = {"model": {"fusion": {"enabled": False}}}
    with pytest.raises(ConfigError, match=r"loss\.terms holds matching, but model\.fusion"):
        validate({"data": {"train": "unused"}, "loss": {"preset": "albef"}, **off})
