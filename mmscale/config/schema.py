"""Every setting of a run: its name, type, default and one line of documentation.

The models are frozen; `load.py` fills them from YAML files and `key=value` words.
"""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.data import DataConfig
from mmscale.config.evaluation import EvalConfig, RetainConfig
from mmscale.config.loss import LossConfig
from mmscale.config.model import ModelConfig
from mmscale.config.paths import BucketSetting, PathSetting
from mmscale.config.training import (
    GuardConfig,
    NegativesConfig,
    OptimConfig,
    ProbeConfig,
    StageConfig,
    StopConfig,
)
from mmscale.config.values import Duration, Positive, Section


class RunConfig(Section):
    """Where a run lives and how it starts."""

    dir: PathSetting = "runs/latest"
    """Folder that the run writes to."""
    seed: int = 0
    """Seed of the initial weights, the data order, the captions and the crops."""
    resume: PathSetting = "auto"
    """`auto`: go on from the newest sound checkpoint; `never`; or a checkpoint's path."""
    overwrite: bool = False
    """With `resume=never`: replace a run that is already in the folder."""
    sync: BucketSetting | None = None
    """Where in a bucket (`s3://`, `gs://`, `az://`) the run is mirrored to, and goes on from."""


class NonFiniteConfig(Section):
    """What is done about a loss or gradient that is not finite."""

    skips: Annotated[int, Field(ge=0)] = 4
    """Updates in a row that are skipped before the weights go back to the last checkpoint's."""
    rollbacks: Annotated[int, Field(ge=0)] = 2
    """How often they go back, past the batches at fault, before the run ends with exit 3."""


class TrainConfig(Section):
    """How long, and in what batches."""

    duration: Duration = Duration(10, "epochs")
    """Length of the run."""
    global_batch_size: Positive = 256
    """Pairs contrasted together, over all ranks and chunks."""
    micro_batch_size: Literal["auto"] | Positive = "auto"
    """Rows a rank forwards at once; `auto`: all of its share."""
    non_finite: NonFiniteConfig = NonFiniteConfig()
    """Losses and gradients that are not finite."""


class EngineConfig(Section):
    """What runs the updates, where, and in which precision."""

    kind: Literal["auto", "deepspeed", "accelerate"] = "auto"
    """`auto`: DeepSpeed with `engine.deepspeed` or its launcher; else accelerate or FSDP2."""
    deepspeed: PathSetting | None = None
    """A DeepSpeed JSON with ZeRO choices, or the name of one that comes with mmscale: `zero2`."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the device computes it fast, else fp32; `tf32`: fp32, products rounded."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: CUDA, then MPS, then CPU."""
    compile: Literal["off", "blocks", "auto"] = "off"
    """Compile transformer blocks, and pad captions to a few lengths; `auto`: on CUDA, long runs."""
    timeout: Positive = 600
    """Seconds that a rank may stand still: in a batch, an update, an exchange with the others."""
    reshard_after_forward: bool = False
    """Without DeepSpeed on several ranks: gather a block's weights anew for each pass over it."""


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    keep: Positive = 2
    """How many of the newest that were due are kept; one that a stop left is kept besides."""
    best: str | None = None
    """Figure of the evaluations, such as `eval/i2t_r1` or of a named set `eval/coco/i2t_r1`: its
    best checkpoint is kept besides."""
    best_is: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of `best` is the best."""
    failures: Annotated[int, Field(ge=0)] = 3
    """How many checkpoints in a row may fail to be written before the run ends with exit 5."""


class LogConfig(Section):
    """Where figures go."""

    every: Duration = Duration(1, "steps")
    """How often a training line is written."""
    profile: Duration | None = None
    """Trace so much of a run with torch.profiler, from its fourth update on: `profile.json.gz`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Send the figures to Weights & Biases."""
    wandb_project: str = "mmscale"
    """Project (wandb, trackio) or experiment (MLflow) that the figures are filed under."""
    wandb_images: bool = False
    """Send the photographs of the report's gallery too; figures and drawn pictures always go."""
    tensorboard: bool = False
    """Write the figures to TensorBoard's event files, in `RUN/tensorboard`."""
    trackio: Literal["off", "offline", "online"] = "off"
    """Give the figures to trackio: on this machine, or where `TRACKIO_SPACE_ID` or
    `TRACKIO_SERVER_URL` says."""
    mlflow: Literal["off", "offline", "online"] = "off"
    """Give the figures to MLflow: in `RUN/mlflow.db`, or where `MLFLOW_TRACKING_URI` says."""
    page: bool = True
    """Draw `report.html` at the end; where many short runs are compared it takes the most time."""
    map: Literal["pca", "tsne", "umap"] = "pca"
    """How the report lays out its maps; t-SNE and UMAP need `pip install 'mmscale[maps]'`."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    """Folder, seed, resume."""
    data: DataConfig
    """Streams."""
    model: ModelConfig = ModelConfig()
    """Towers and heads."""
    loss: LossConfig = LossConfig()
    """Objective."""
    negatives: NegativesConfig = NegativesConfig()
    """What pairs are contrasted with."""
    train: TrainConfig = TrainConfig()
    """Length and batches."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and rates."""
    stages: tuple[StageConfig, ...] = ()
    """Stretches of the run that train other parts, at other rates, on other terms."""
    stop: StopConfig = StopConfig()
    """Early stopping and guards."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed or accelerate."""
    eval: EvalConfig = EvalConfig()
    """Evaluation sets."""
    retain: RetainConfig = RetainConfig()
    """What it must not forget."""
    probe: ProbeConfig = ProbeConfig()
    """Health figures."""
    guard: GuardConfig = GuardConfig()
    """What is done about a failing space."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Figures."""
