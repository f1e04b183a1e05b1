"""The table of hard batches from the run's own model: what it finds alike as it is now."""

from dataclasses import replace

from mmscale.contracts import World
from mmscale.data.arrange import Neighbours
from mmscale.data.features import FeatureTable
from mmscale.engine.inference import Inference
from mmscale.parallel.peers import from_main


def own_neighbours(
    inference: Inference, features: FeatureTable, by: str, world: World
) -> Neighbours:
    """The nearest images of each training image by the model's embeddings. Collective.

    Args:
        inference: Calls the model.
        features: Tower outputs of the training set.
        by: `image`, or `text` for the mean of an image's captions.
        world: The ranks; all get the main one's table.
    """
    device = inference.device
    image, text, *_ = inference.call("heads", features.image.to(device), features.text.to(device))
    embedded = replace(features, image=image.unit.float().cpu(), text=text.unit.float().cpu())
    table = embedded.neighbours(by).tensors() if world.is_main else None
    return Neighbours.of(from_main(world, table))
