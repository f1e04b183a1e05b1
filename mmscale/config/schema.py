"""Every setting of a run: its name, type, default and one line of documentation.

The models are frozen; `load.py` fills them from YAML files and `key=value` words.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from mmscale.config.batches import HardBatchesConfig
from mmscale.config.duration import Duration
from mmscale.config.guard import GuardConfig, ProbeConfig
from mmscale.config.heads import FusionConfig, HeadConfig
from mmscale.config.loss import LossConfig
from mmscale.config.negatives import NegativesConfig
from mmscale.config.optim import OptimConfig
from mmscale.config.paths import PathSetting, PathsSetting
from mmscale.config.ramp import Ramp
from mmscale.config.section import Positive, Section
from mmscale.config.sources import Sources
from mmscale.config.stages import StageConfig
from mmscale.config.stopping import StopConfig


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


class DataConfig(Section):
    """The training and evaluation streams."""

    train: Sources
    """Packed folder with its manifest, globs or brace lists of tars beside one, `http(s)://` of
    either, or a list of such; or sources with weights: `[{shards: a, weight: 2}, {shards: b}]`."""
    eval: PathsSetting | None = None
    """Packed folder of held-out pairs; without it nothing is evaluated."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` in `data.train` run the command; what it writes is the shard."""
    resampled: bool = False
    """Draw shards with replacement and read each to its end, without a manifest. The order still
    follows from the position; going on in mid-epoch reads the epoch's part before it again."""
    epoch_samples: Positive | None = None
    """With `resampled`: images that count as an epoch; default the first shard's times shards."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes a rank; 0 decodes in the training process."""
    lanes: Literal["auto"] | Positive = "auto"
    """Sub-streams that an epoch is cut into; must divide the batch, the world must divide it."""
    shuffle_buffer: Positive = 8192
    """Raw samples held for shuffling, over all lanes and ranks together."""
    captions: Literal["random", "first", "flat"] | Positive = "random"
    """Rows an image an epoch: one `random` caption, the `first`, every one (`flat`), or k."""
    caption_cleaning: Literal["none", "whitespace", "lower", "canonicalize"] = "none"
    """Before the tokenizer, by OpenCLIP's names: mend encoding and spaces; lower case; no marks."""
    match: Literal["image", "caption", "group"] = "image"
    """Which images count as one: by id; by equal content or caption; or by the data's `group`."""
    positive_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of a batch's images beside another that `match` makes one with it; 0 keeps all such
    images apart, null leaves them as they fall."""
    hard_batches: HardBatchesConfig = HardBatchesConfig()
    """Neighbours in one batch."""
    image_size: Positive | None = None
    """Side of the square input in pixels; default the image tower's own."""
    augment: Literal["none", "crop", "flip", "color_jitter", "randaugment", "trivialaugment"] = (
        "crop"
    )
    """`none`: the evaluation transform; `crop`: a random resized crop; the others do theirs to it.
    `flip` mirrors half of the images, which makes captions wrong that say left or right."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that a random crop keeps, from and to."""
    max_damaged: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of an epoch's rows that may be undecodable before the run ends with exit 4."""
    feature_cache: PathSetting | None = None
    """Folder that keeps frozen towers' outputs; needs both towers frozen and `augment=none`."""
    decoded_cache: PathSetting | None = None
    """Folder that keeps decoded training images, shrunk as far as crops allow."""
    cache_gb: Annotated[float, Field(gt=0)] = 64.0
    """Most that each of the two caches may hold, in GB; what was used longest ago goes first."""

    @property
    def rows_per_item(self) -> int:
        """Rows that one turn of a sample gives to a batch: k where `captions` is k."""
        return self.captions if isinstance(self.captions, int) else 1


class TowerConfig(Section):
    """One of the two encoders."""

    name: PathSetting | None = None
    """`timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`."""
    weights: PathSetting = "pretrained"
    """`pretrained`, `random`, or a file (safetensors, or torch weights only)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tower's constructor, such as `pad_type: same`."""
    frozen: bool | int = False
    """Keep weights, in evaluation mode: all (`true`), the first N blocks, all but the last (-N)."""
    checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    width: Positive | None = None
    """Features that the tower must give, where you want to be sure; its own width is read."""


class VisionConfig(TowerConfig):
    """The image encoder."""

    pooling: Literal["auto", "cls", "mean", "map"] = "auto"
    """How tokens become one vector: `auto` the model's own; `map`: one learnt query attends."""
    mean: float | tuple[float, float, float] | None = None
    """Normalisation mean for pixels in [0, 1]; default the tower's own."""
    std: float | tuple[float, float, float] | None = None
    """Normalisation standard deviation for pixels in [0, 1]; default the tower's own."""


class TextConfig(TowerConfig):
    """The caption encoder."""

    pooling: Literal["auto", "cls", "mean", "eos", "map"] = "auto"
    """How tokens become one vector: `auto` the model's own, else `mean`; `eos`: the last one."""
    context_length: Positive | None = None
    """Most tokens of a caption; default the tower's own, at most 77."""


class LogitScaleConfig(Section):
    """The inverse temperature: learnt, fixed or scheduled."""

    init: Annotated[float, Field(gt=0)] = 1 / 0.07
    """First value of the scale (1 / temperature); 10 by default with a `siglip` term."""
    max: Annotated[float, Field(gt=0)] = 100.0
    """The scale is clamped to [1, max] where it is used."""
    learn: bool = True
    """Learn the scale; without it the scale stays at `init`."""
    course: Ramp | None = None
    """The scale as a ramp, instead of learning it."""
    by_data_size: bool = False
    """Below 1,000 training images start at 0.8 times the temperature: `init` and `course` / 0.8."""
    bias: float | None = None
    """First value of the learnt bias that `siglip` adds to logits; default -10 with that term."""


class ModelConfig(Section):
    """Two towers, their heads and the logit scale."""

    preset: PathSetting | None = None
    """`small`, `medium`, `medium-mobilebert`, `large` or `openclip:NAME`; explicit settings win."""
    weights: PathSetting = "random"
    """A run or checkpoint whose weights the run begins with. For `openclip:NAME` also `random`, an
    OpenCLIP tag, a file, or `pretrained`: those in the folder of `local-dir:` or the hub's page."""
    vision: VisionConfig = VisionConfig()
    """Image encoder."""
    text: TextConfig = TextConfig()
    """Caption encoder."""
    embed_dim: Positive = 512
    """Width shared by images and captions."""
    head: HeadConfig = HeadConfig()
    """Projections."""
    fusion: FusionConfig = FusionConfig()
    """Cross-attention on top of both towers."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.995
    """Decay of the momentum encoder, the running mean of the weights, where something uses it."""
    logit_scale: LogitScaleConfig = LogitScaleConfig()
    """Inverse temperature."""


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
    """`auto`: DeepSpeed if `engine.deepspeed` is set or its launcher runs, else accelerate."""
    deepspeed: PathSetting | None = None
    """A DeepSpeed JSON with ZeRO choices, or the name of one that comes with mmscale: `zero2`."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the device computes it fast, else fp32; `tf32`: fp32, products rounded."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: CUDA, then MPS, then CPU."""
    timeout: Positive = 600
    """Seconds that a rank may stand still: in a batch, an update, an exchange with the others."""


class EvalConfig(Section):
    """Retrieval on held-out pairs."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    batch_size: Positive = 128
    """Rows a rank encodes at once."""
    weights: Literal["trained", "ema"] = "trained"
    """What is evaluated: the trained weights, or their running mean (`model.momentum`)."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """First candidates of each query that fusion puts in another order, reported apart; 0 = off."""


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    keep: Positive = 2
    """How many of the newest that were due are kept; one that a stop left is kept besides."""
    best: str | None = None
    """Metric of the evaluations, such as `eval/i2t_r1`: its best checkpoint is kept besides."""
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
    """Project that the figures are filed under."""
    wandb_images: bool = False
    """Send the photographs of the report's gallery too; figures and drawn pictures always go."""
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
    """Retrieval."""
    probe: ProbeConfig = ProbeConfig()
    """Health figures."""
    guard: GuardConfig = GuardConfig()
    """What is done about a failing space."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Figures."""
