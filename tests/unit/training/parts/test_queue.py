"""How much of the queue an update looks at."""

from functools import partial

import torch

from mmscale.config.values import Ramp, whole_steps
from mmscale.parallel.peers import Alone
from mmscale.training.parts.queue import Queue, RowBank
from tests.ranks.tiny import joint_batch
from tests.unit.training.rows import features, loss_input


def test_the_queues_length_follows_its_ramp_latest_rows_first():
    bank = RowBank(10, 1, False, torch.device("cpu"))
    for place in range(13):
        bank.add(torch.full((1, 1), float(place)), torch.zeros(1, 1), torch.tensor([place]))
    ramp = Ramp.parse({"from": 0, "to": 1, "over": "4 steps", "start": "2 steps"})
    queue = Queue(bank, Alone(), partial(ramp.at, steps_of=whole_steps), of_momentum=False)
    seen = [
        queue.inputs(loss_input(2, 1, step), features(2, 1), joint_batch()).bank
        for step in range(8)
    ]
    assert [0 if rows is None else len(rows.ids) for rows in seen] == [0, 0, 0, 2, 5, 8, 10, 10]
    assert seen[4].image[:, 0].tolist() == seen[4].ids.tolist() == [12, 11, 10, 9, 8]
