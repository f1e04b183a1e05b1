import json
from dataclasses import replace

import torch

from mmscale.diagnostics.space import LARGEST_SAMPLE, similarity_histogram
from tests.unit.diagnostics.faulty_embeddings import healthy, isotropic, joint_collapse


def test_every_pair_is_counted_once():
    pairs = healthy(0.7)(300, 32, 0)
    five = replace(pairs, text=pairs.text.repeat(5, 1), text_ids=pairs.text_ids.repeat(5))
    content = json.loads(json.dumps(similarity_histogram(five)))
    assert sum(content["matched"]["counts"]) == 1500
    assert sum(content["unmatched"]["counts"]) == 300 * 1500 - 1500
    assert (content["width"], content["images"], content["captions"]) == (32, 300, 1500)


def test_matched_lie_above_unmatched():
    content = similarity_histogram(healthy(0.7)(300, 32, 0))
    means = []
    for name in ("matched", "unmatched"):
        edges, counts = (
            torch.tensor(content[name][k], dtype=torch.float64) for k in ("edges", "counts")
        )
        means.append(float((counts * (edges[1:] + edges[:-1]) / 2).sum() / counts.sum()))
    assert means[0] > means[1] + 0.3


def test_equal_rows_fill_one_bin():
    content = similarity_histogram(joint_collapse(0.0)(64, 16, 0))
    assert sorted(content["unmatched"]["counts"])[-1] == 64 * 63


def test_a_large_set_is_thinned():
    content = similarity_histogram(isotropic(LARGEST_SAMPLE + 500, 8, 0))
    assert content["images"] == content["captions"] == LARGEST_SAMPLE
