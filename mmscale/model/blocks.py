"""The transformer blocks of a tower: what is gathered, sharded or compiled as one."""

import sys

from torch import nn

# By library, since not every release has each of them: a block takes its tokens as first argument.
_CLASSES = {
    "timm.models.vision_transformer": (
        "Block",
        "ResPostBlock",
        "ParallelScalingBlock",
        "ParallelThingsBlock",
    ),
    "timm.models.eva": ("EvaBlock", "EvaBlockPostNorm"),
    "timm.models.beit": ("Block",),
    "open_clip.transformer": ("ResidualAttentionBlock", "CustomResidualAttentionBlock"),
    # Every layer of transformers that checkpointing knows is made from it.
    "transformers.modeling_layers": ("GradientCheckpointingLayer",),
}


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower in its order, none within another; empty for one without any."""
    classes = _classes()
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in tower.modules():
        if isinstance(module, classes) and id(module) not in inside:
            found.append(module)
            inside.update(id(part) for part in module.modules())
    return found


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of both towers, and fusion as one."""
    found = [block for tower in ("vision", "text") for block in blocks(model.get_submodule(tower))]
    fusion = getattr(model, "fusion", None)
    return found if fusion is None else [*found, fusion]


def _classes() -> tuple[type[nn.Module], ...]:
    # A tower's library is imported.
    named = (
        (sys.modules.get(library), name) for library, names in _CLASSES.items() for name in names
    )
    return tuple(getattr(library, name) for library, name in named if hasattr(library, name))
