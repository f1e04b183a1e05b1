"""The objective: a weighted sum of terms."""

from mmscale.config.schema import Config
from mmscale.contracts import LossInput, LossOutput, Peers
from mmscale.dist.peers import Alone
from mmscale.loss.softmax import infonce


class Objective:
    """Computes this rank's share of the objective from the embeddings of its rows."""

    def __init__(self, config: Config, peers: Peers):
        self._terms = config.loss.terms
        self._peers: Peers = peers if config.negatives.gather else Alone()

    def __call__(self, rows: LossInput) -> LossOutput:
        """Mean over this rank's rows of each term, and their weighted sum."""
        image, text = rows.image.unit, rows.text.unit
        terms = {
            term.kind: infonce(image, text, rows.ids, rows.scale, self._peers)
            for term in self._terms
        }
        total = sum((term.weight * terms[term.kind] for term in self._terms), image.new_zeros(()))
        return LossOutput(total, {name: value.detach() for name, value in terms.items()})
