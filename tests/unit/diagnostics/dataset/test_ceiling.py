import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from mmscale.data.scenes import draw_scene
from mmscale.data.synth import describe_scene
from mmscale.diagnostics.dataset.ceiling import ceiling
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls
from mmscale.parallel.peers import Alone


def by_trying(captions, owners, looks):
    """Every answer to every query that differs from others; equal candidates come by chance."""
    words, kinds = sorted(set(captions)), sorted(set(looks))
    texts = range(len(captions))

    def text_hits(kind, word):
        named = [t for t in texts if captions[t] == word]
        asked = [i for i, look in enumerate(looks) if look == kind]
        return sum(sum(owners[t] == i for t in named) / len(named) for i in asked)

    def image_hits(word, kind):
        shown = [i for i, look in enumerate(looks) if look == kind]
        return sum((owners[t] in shown) / len(shown) for t in texts if captions[t] == word)

    i2t = max(
        sum(map(text_hits, kinds, answers))
        for answers in itertools.product(words, repeat=len(kinds))
    )
    t2i = max(
        sum(map(image_hits, words, answers))
        for answers in itertools.product(kinds, repeat=len(words))
    )
    return 100 * i2t / len(looks), 100 * t2i / len(captions)


@pytest.mark.parametrize("seed", range(20))
def test_no_answers_reach_more_and_some_reach_it(seed):
    draw = random.Random(seed)
    looks = [draw.randrange(4) for _ in range(5)]
    owners = [*range(5), *(draw.randrange(5) for _ in range(4))]
    captions = [draw.choice("abcd") for _ in owners]
    found = ceiling(captions, owners, looks)
    assert (found.i2t_r1, found.t2i_r1) == pytest.approx(by_trying(captions, owners, looks))


def test_case_spaces_and_copies():
    found = ceiling(["A dog.", "a  DOG.", "A cat"], [0, 1, 2])
    assert (found.i2t_r1, found.t2i_r1) == pytest.approx((200 / 3, 200 / 3))
    assert (found.shared_captions, found.shared_images) == (2, 0)
    found = ceiling(["one", "two", "three"], [0, 1, 2], looks=[0, 0, 1])
    assert (found.i2t_r1, found.t2i_r1) == pytest.approx((200 / 3, 200 / 3))
    assert (found.shared_captions, found.shared_images) == (0, 2)


@pytest.mark.parametrize("ambiguous", [0.1, 0.4])
def test_a_model_that_knows_everything_about_ambiguous_scenes_comes_to_it(ambiguous):
    """Scenes are shown several times with one caption each; a little noise breaks ties."""
    draw = random.Random(0)
    scenes: list[int] = []
    while len(scenes) < 600:
        scenes += [len(scenes)] * (draw.randint(2, 4) if draw.random() < ambiguous else 1)
    captions = [describe_scene(draw_scene(1, scene), f"1/{scene}")[0] for scene in scenes]
    which = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    codes = F.normalize(torch.randn(len(which), 256, generator=torch.Generator().manual_seed(0)))
    shown = [which[caption] for caption in captions]
    rows = codes[shown]
    ids = torch.arange(len(scenes))
    found = ceiling(captions, range(len(scenes)), shown)
    reached = []
    for seed in range(5):
        noise = torch.randn(2, *rows.shape, generator=torch.Generator().manual_seed(seed)) / 1e4
        pairs = Pairs(*(F.normalize(rows + part, dim=1) for part in noise), ids, ids)
        reached.append(recalls(pairs, Alone()))
    for name in ("i2t_r1", "t2i_r1"):
        mean = sum(figures[name] for figures in reached) / 5
        assert mean < 90
        assert abs(mean - getattr(found, name)) < 2
