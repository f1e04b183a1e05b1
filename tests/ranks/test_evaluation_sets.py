"""Evaluation sets over several ranks: the figures of one process, to the last digit."""

import os

from mmscale.contracts import World
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.evaluation.encoded import open_sets
from mmscale.evaluation.sets import as_logged, evaluate_sets
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from tests.ranks.launch import run_on_ranks
from tests.ranks.tiny import tiny_config

# As in `tiny_config`, with all of CLIP's words.
TEXT = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}


def _figures(world_size, val, test):
    sets = {"coco": {"data": test}}
    settings = {"data__eval": val, "data__workers": 0, "eval__sets": sets, "eval__batch_size": 5}
    config = tiny_config(**settings, model__text__options=TEXT)
    peers = connect(World(int(os.environ.get("RANK", 0)), world_size, 0, "test"))
    model, spec = build_model(config.model, None, 0)
    inference = Inference(model, choose(config.engine))
    encoder = Encoder.of(config, inference.call, inference.device, spec, peers)
    found = open_sets(config, spec)
    return as_logged(evaluate_sets(config, encoder.call, encoder.device, found, peers))


def test_ranks_measure_every_set_as_one_process_does(synthetic):
    places = str(synthetic.val), str(synthetic.test)
    alone = _figures(1, *places)
    assert {"eval/mean", "eval/coco/mean"} <= alone.keys()
    assert run_on_ranks(2, _figures, 2, *places) == [alone, alone]
