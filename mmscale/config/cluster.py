"""A cluster to plan for: its figures, from a YAML file or one of the shipped ones."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from mmscale.config.load import read_yaml
from mmscale.config.values import Positive, PositiveFloat, Section
from mmscale.errors import ConfigError

CLUSTERS = Path(__file__).parent / "clusters"


class PeakConfig(Section):
    """What a GPU computes at most, 10^12 FLOP/s of dense products."""

    bf16: PositiveFloat
    """In bf16."""
    fp16: PositiveFloat
    """In fp16."""
    tf32: PositiveFloat
    """In fp32 with products rounded to TF32."""
    fp32: PositiveFloat
    """In fp32."""


class ClusterConfig(Section):
    """GPUs and the links between them; bandwidths are of one direction."""

    name: str
    """What it is called in tables."""
    gpus_per_node: Positive
    """GPUs that a fast link joins."""
    memory_gb: PositiveFloat
    """Memory of a GPU, 10^9 bytes."""
    peak_tflops: PeakConfig
    """Peaks by precision."""
    within_node_gb_per_s: PositiveFloat
    """What one GPU sends to its neighbours in a node, 10^9 bytes a second."""
    between_nodes_gb_per_s: PositiveFloat
    """What all GPUs of a node together send to other nodes, 10^9 bytes a second."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the peak that a lone GPU reaches: an assumption; put in the `mfu` of a run."""
    link_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of a link that collectives reach: an assumption; nccl-tests measure it."""


def read_cluster(name: str) -> ClusterConfig:
    """A shipped cluster by its name, or a YAML file.

    Raises:
        ConfigError: There is no such cluster, or its file is wrong.
    """
    shipped = CLUSTERS / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise ConfigError(f"--cluster {name}: neither a file nor one of {known}; name one of them")
    try:
        return ClusterConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError("\n".join(f"--cluster {path}: {fault}" for fault in faults)) from error
