"""The objective: a weighted sum of terms."""

from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.schema import Config
from mmscale.contracts import Embeddings, LossOutput, Peers
from mmscale.dist.peers import Alone
from mmscale.loss.softmax import infonce


class Objective:
    """Computes this rank's share of the objective from the embeddings of its rows."""

    def __init__(self, config: Config, peers: Peers):
        self._terms = config.loss.terms
        self._peers: Peers = peers if config.negatives.gather else Alone()

    def __call__(
        self,
        image: Embeddings,
        text: Embeddings,
        image_ids: Int64[Tensor, " b"],
        scale: Float[Tensor, "1"],
    ) -> LossOutput:
        """Mean over this rank's rows of each term, and their weighted sum."""
        terms = {
            term.kind: infonce(image.unit, text.unit, image_ids, scale, self._peers)
            for term in self._terms
        }
        total = sum(
            (term.weight * terms[term.kind] for term in self._terms), image.unit.new_zeros(())
        )
        return LossOutput(total, {name: value.detach() for name, value in terms.items()})
