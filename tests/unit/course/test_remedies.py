import pytest

from mmscale.config.load import validate, with_words
from mmscale.course.remedies import words_against
from mmscale.diagnostics.verdicts import RULES

CONFIG = validate({"data": {"train": "none"}, "loss": {"preset": "clip"}})


@pytest.mark.parametrize("verdict", RULES)
def test_words_load_and_set_what_they_say_once(verdict):
    words = words_against(verdict, CONFIG)
    mended = with_words(CONFIG, words)
    assert with_words(mended, words) == mended
    assert (mended == with_words(CONFIG, ())) == (not words)


def test_rates_fall_and_terms_are_added():
    mended = with_words(CONFIG, words_against("complete_collapse", CONFIG))
    assert mended.optim.lr == pytest.approx(CONFIG.optim.lr / 10)
    wider = with_words(CONFIG, words_against("dimensional_collapse", CONFIG))
    assert [term.kind for term in wider.loss.terms] == ["infonce", "vicreg"]
    assert words_against("dimensional_collapse", wider) == ()


@pytest.mark.parametrize("verdict", ["shuffled_pairs", "unaligned", "too_few_samples"])
def test_no_setting_mends_the_data_or_the_code(verdict):
    assert words_against(verdict, CONFIG) == ()
