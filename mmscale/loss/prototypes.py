"""Prototypes: images are clustered once an epoch, and every row must find its image's cluster.

Outside the guarantee of one global batch: the clusters come from momentum features of another time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.loss import PrototypesTerm
from mmscale.contracts import Peers, Prototypes
from mmscale.errors import ConfigError
from mmscale.loss.contrast import wide
from mmscale.loss.supervised import NO_LABEL, classification
from mmscale.loss.term import Bounds, Given, TermValue, term

ITERATIONS = 20
# Keeps the temperature of small clusters, and of those whose members coincide, from zero.
SMOOTHING = 10
QUANTILES = (0.1, 0.9)


@dataclass(frozen=True)
class Clustering:
    """What an epoch's clustering found.

    Attributes:
        centres: Unit rows.
        temperature: Of each cluster.
        ids: Identities of the images clustered, ascending.
        cluster: Cluster of each of these images.
    """

    centres: Float[Tensor, "c d"]
    temperature: Float[Tensor, " c"]
    ids: Int64[Tensor, " images"]
    cluster: Int64[Tensor, " images"]

    def of(self, ids: Int64[Tensor, " b"]) -> Prototypes:
        """What the loss needs for a rank's rows."""
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        cluster = self.cluster[place].where(self.ids[place] == ids, NO_LABEL)
        return Prototypes(self.centres, self.temperature, cluster)


def prototypes(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    found: tuple[Prototypes, ...],
    peers: Peers,
) -> Float[Tensor, ""]:
    """Cross-entropy of each row's own cluster among all, mean over modalities and clusterings.

    For a row v of cluster c: logsumexp_k(v.m_k / phi_k) - v.m_c / phi_c. All clusters are
    candidates, so that two images of one cluster are not each other's negatives.

    Source: Li et al. 2021, "Prototypical Contrastive Learning" (arXiv 2005.04966), equation 11.
    """
    losses = [
        classification(wide(rows) @ wide(one.centres).T / one.temperature, one.cluster, peers)
        for one in found
        for rows in (image, text)
    ]
    return torch.stack(losses).mean()


@term(PrototypesTerm)
def _prototypes(settings: PrototypesTerm, given: Given) -> TermValue | None:
    found = given.needed(given.rows.prototypes, settings, "clusters")
    if not found:
        # The first clusters are made at the end of the first epoch.
        return None
    pairs = given.pairs
    chance = sum(map(math.log, settings.clusters)) / len(settings.clusters)
    loss = prototypes(pairs.image, pairs.text, found, given.peers)
    return TermValue(loss, lambda counts: Bounds(0.0, chance))


def cluster(
    features: Float[Tensor, "images d"],
    ids: Int64[Tensor, " images"],
    num_clusters: int,
    temperature: float,
    seed: int,
) -> Clustering:
    """Cluster the training images by their momentum features; the same on every rank.

    Args:
        features: One unit row an image; all images, so that ranks agree.
        ids: Their identities, each once.
        num_clusters: How many clusters.
        temperature: Mean temperature of the clusters.
        seed: Of the first centres.

    Raises:
        ConfigError: There are not more images than clusters.
    """
    if num_clusters >= len(features):
        raise ConfigError(
            f"loss.terms: prototypes with clusters={num_clusters} needs more images than the "
            f"{len(features)} of the training set; lower it"
        )
    ids, order = ids.sort()
    features = features[order]
    centres, assigned = kmeans(features, num_clusters, seed)
    return Clustering(
        F.normalize(centres, dim=1),
        concentrations(features, centres, assigned, temperature),
        ids,
        assigned,
    )


def kmeans(
    rows: Float[Tensor, "n d"], num_clusters: int, seed: int, iterations: int = ITERATIONS
) -> tuple[Float[Tensor, "c d"], Int64[Tensor, " n"]]:
    """Lloyd's iterations from k-means++ centres; a cluster that empties takes the farthest row.

    Returns:
        Centres, and the nearest centre of each row.

    Source: Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding".
    """
    generator = torch.Generator().manual_seed(seed)
    centres = _first_centres(rows, num_clusters, generator)
    for _ in range(iterations):
        distance, assigned = _nearest(rows, centres)
        count = assigned.bincount(minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, assigned, rows)
        moved = sums / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero()[:, 0]
        moved[empty] = rows[distance.topk(len(empty)).indices]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, _nearest(rows, centres)[1]


def concentrations(
    rows: Float[Tensor, "n d"],
    centres: Float[Tensor, "c d"],
    assigned: Int64[Tensor, " n"],
    temperature: float,
) -> Float[Tensor, " c"]:
    """A temperature for each cluster: low where many rows lie close to the centre.

    phi = sum of distances / (size ln(size + 10)), single rows as the largest, cut to the 10th and
    90th percentile and scaled to a mean of `temperature`.

    Source: Li et al. 2021 (arXiv 2005.04966), equation 12, with the cuts of its authors' code.
    """
    distance = (rows - centres[assigned]).norm(dim=1)
    count = assigned.bincount(minlength=len(centres)).to(rows.dtype)
    total = torch.zeros_like(count).index_add_(0, assigned, distance)
    phi = total / (count.clamp(min=1) * (count + SMOOTHING).log())
    phi = phi.where(count > 1, phi.max())
    low, high = (phi.quantile(q) for q in QUANTILES)
    phi = phi.clamp(low, high)
    mean = phi.mean()
    # All members on their centres: no cluster is tighter than another.
    return temperature * (phi / mean if mean > 0 else torch.ones_like(phi))


def _first_centres(
    rows: Float[Tensor, "n d"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "c d"]:
    """Each next centre is a row drawn with probability by its squared distance to the nearest."""
    drawn = torch.randint(len(rows), (1,), generator=generator).to(rows.device)
    centres = rows[drawn]
    distance = _squares(rows, centres)[:, 0]
    for _ in range(num_clusters - 1):
        reach = distance.double().cumsum(0)
        point = torch.rand(1, generator=generator, dtype=torch.float64).to(rows.device) * reach[-1]
        drawn = torch.searchsorted(reach, point).clamp(max=len(rows) - 1)
        centres = torch.cat([centres, rows[drawn]])
        distance = distance.minimum(_squares(rows, centres[-1:])[:, 0])
    return centres


def _nearest(
    rows: Float[Tensor, "n d"], centres: Float[Tensor, "c d"]
) -> tuple[Float[Tensor, " n"], Int64[Tensor, " n"]]:
    nearest = [_squares(piece, centres).min(1) for piece in rows.split(4096)]
    return torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])


def _squares(rows: Float[Tensor, "n d"], centres: Float[Tensor, "c d"]) -> Float[Tensor, "n c"]:
    lengths = rows.pow(2).sum(1)[:, None] + centres.pow(2).sum(1)
    return (lengths - 2 * rows @ centres.T).clamp(min=0)
