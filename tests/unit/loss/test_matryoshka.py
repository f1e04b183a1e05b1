"""Widths: the value spelt out, what is refused, and recall at each of them."""

import pytest
import torch
import torch.nn.functional as F

from mmscale.config.load import load_config, validate
from mmscale.contracts import Bank
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls
from mmscale.errors import ConfigError
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, leaves, loss, made_up


def test_it_is_the_sum_of_the_term_on_the_heads_outputs_cut():
    leaf = leaves(IDS)
    wanted = 0.0
    for width, weight in ((2, 1.0), (4, 1.0)):
        short = leaf | {side: leaf[side][:, :width] for side in ("image", "text")}
        wanted += weight * loss("infonce", made_up(short, IDS), Alone()).item()
    assert loss("matryoshka", made_up(leaf, IDS), Alone()).item() == pytest.approx(
        wanted, rel=1e-12
    )


def test_remembered_rows_are_cut_too():
    rows = made_up(leaves(IDS), IDS, with_bank=True)
    wanted = 0.0
    for width in (2, 4):
        short = {side: leaves(IDS)[side][:, :width] for side in ("image", "text")}
        inner = made_up(leaves(IDS) | short, IDS)
        bank = Bank(
            F.normalize(rows.bank.image[:, :width]),
            F.normalize(rows.bank.text[:, :width]),
            rows.bank.ids,
        )
        object.__setattr__(inner, "bank", bank)
        wanted += loss("infonce", inner, Alone()).item()
    assert loss("matryoshka", rows, Alone()).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("of", ["infonce", "ntxent", "siglip"])
def test_its_chance_is_that_of_the_term_times_the_weights(of):
    """With a queue, of which a term of views sees nothing."""
    terms = [{"kind": of}, {"kind": "matryoshka", "widths": [2, 4], "weights": [1, 0.5]}]
    terms[1]["of"] = {"kind": of}
    model = {"embed_dim": 6, "logit_scale": {"bias": -3.0}}
    config = validate({"data": {"train": "x"}, "model": model, "loss": {"terms": terms}})
    found = Objective(config, Alone())(made_up(leaves(IDS), IDS, with_bank=True)).terms
    for bound in ("floor", "chance"):
        assert found[f"matryoshka_{bound}"].item() == pytest.approx(1.5 * found[f"{of}_{bound}"])


TERM = "loss.terms=[{kind: infonce},{kind: matryoshka, widths: %s}]"


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (TERM % "[64, 512]", "width of 512, but model.embed_dim=512"),
        (TERM % "[64, 32]", r"widths that ascend, not \[64, 32\]"),
        (TERM % "[32, 64], weights: [1]", "as many weights as widths"),
        (TERM % "[32], of: {kind: infonce, weight: 0.5}", "take the weight out of its of"),
        (TERM % "[32], of: {kind: vicreg}", "of"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, word, named):
    (tmp_path / "mine.yaml").write_text("data: {train: shards}\n", "utf-8")
    with pytest.raises(ConfigError, match=named):
        load_config([str(tmp_path / "mine.yaml"), word])


def test_a_width_that_only_the_built_model_shows_to_be_too_large_is_refused():
    config = validate(
        {
            "data": {"train": "x"},
            "model": {"preset": "small"},
            "loss": {"terms": [{"kind": "matryoshka", "widths": [6]}]},
        }
    )
    with pytest.raises(ConfigError, match="width of 6, and the embeddings are 6 wide"):
        Objective(config, Alone())(made_up(leaves(IDS), IDS))


def test_recall_of_cut_pairs_is_that_of_the_first_dimensions():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    text = image.clone()
    text[:, 3:] = torch.randn(40, 5, generator=generator)
    ids = torch.arange(40)
    pairs = Pairs(image, F.normalize(text, dim=1), ids, ids)
    assert recalls(pairs.cut(3), Alone())["i2t_r1"] == 100
    assert recalls(pairs, Alone())["i2t_r1"] < 100
