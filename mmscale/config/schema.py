"""Every setting of a run: its name, type, default and one line of documentation.

The models are frozen; `load.py` fills them from YAML files and `key=value` words.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmscale.config.duration import Duration

Positive = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A group of settings; unknown names are refused, values never change after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class RunConfig(Section):
    """Where a run lives and how it starts."""

    dir: str = "runs/latest"
    """Folder that the run writes to."""
    seed: int = 0
    """Seed of the initial weights, the data order, the captions and the crops."""
    resume: str = "auto"
    """`auto`: go on from the newest sound checkpoint; `never`; or a checkpoint's path."""
    overwrite: bool = False
    """With `resume=never`: replace a run that is already in the folder."""


class DataConfig(Section):
    """The training and evaluation streams."""

    train: str | list[str]
    """Packed folder with its manifest, or tar globs and brace lists beside a manifest."""
    eval: str | list[str] | None = None
    """Packed folder of held-out pairs; without it nothing is evaluated."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes a rank; 0 decodes in the training process."""
    lanes: Literal["auto"] | Positive = "auto"
    """Sub-streams that an epoch is cut into; must divide the batch, the world must divide it."""
    shuffle_buffer: Positive = 8192
    """Raw samples held for shuffling, over all lanes and ranks together."""
    captions: Literal["random", "first", "flat"] | Positive = "random"
    """Rows an image an epoch: one `random` caption, the `first`, every one (`flat`), or k."""
    image_size: Positive | None = None
    """Side of the square input in pixels; default the image tower's own."""
    augment: Literal["none", "crop"] = "crop"
    """Training transform: `none` is the evaluation transform, `crop` a random resized crop."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that a random crop keeps, from and to."""
    max_damaged: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of an epoch's rows that may be undecodable before the run ends with exit 4."""
    feature_cache: str | None = None
    """Folder that keeps frozen towers' outputs; needs both towers frozen and `augment=none`."""


class TowerConfig(Section):
    """One of the two encoders."""

    name: str | None = None
    """`timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`."""
    weights: str = "pretrained"
    """`pretrained`, `random`, or a file (safetensors, or torch weights only)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tower's constructor, such as `pad_type: same`."""
    frozen: bool = False
    """Keep the weights as they are and run the tower in evaluation mode."""


class VisionConfig(TowerConfig):
    """The image encoder."""

    mean: float | tuple[float, float, float] | None = None
    """Normalisation mean for pixels in [0, 1]; default the tower's own."""
    std: float | tuple[float, float, float] | None = None
    """Normalisation standard deviation for pixels in [0, 1]; default the tower's own."""


class TextConfig(TowerConfig):
    """The caption encoder."""

    pooling: Literal["auto", "cls", "mean"] = "auto"
    """How a Hugging Face tower's tokens become one vector; `auto`: the model's own, else `mean`."""
    context_length: Positive | None = None
    """Most tokens of a caption; default the tower's own, at most 77."""


class HeadConfig(Section):
    """The projection of each tower's output to the shared width."""

    kind: Literal["linear", "mlp"] = "linear"
    """`linear`, or `mlp` with one GELU layer as wide as its input."""
    bias: bool = False
    """Give linear layers a bias."""
    standardize: Annotated[int, Field(ge=0)] = 0
    """Rows on which each feature's mean and deviation are fitted before the first step; 0 = off."""


class LogitScaleConfig(Section):
    """The learnt inverse temperature."""

    init: Annotated[float, Field(gt=0)] = 1 / 0.07
    """First value of the scale (1 / temperature)."""
    max: Annotated[float, Field(gt=0)] = 100.0
    """The scale is clamped to [1, max] where it is used."""


class ModelConfig(Section):
    """Two towers, their heads and the logit scale."""

    preset: str | None = None
    """`small`, `medium`, `large` or `openclip:NAME`; fills the towers, explicit settings win."""
    weights: str = "random"
    """For `openclip:NAME`: `random`, an OpenCLIP tag, or a file."""
    vision: VisionConfig = VisionConfig()
    """Image encoder."""
    text: TextConfig = TextConfig()
    """Caption encoder."""
    embed_dim: Positive = 512
    """Width shared by images and captions."""
    head: HeadConfig = HeadConfig()
    """Projections."""
    logit_scale: LogitScaleConfig = LogitScaleConfig()
    """Inverse temperature."""


class InfoNCEConfig(Section):
    """Symmetric multi-positive InfoNCE by image id."""

    kind: Literal["infonce"] = "infonce"
    """Which loss this term is."""
    weight: float = 1.0
    """Factor of this term in the objective."""


class LossConfig(Section):
    """The objective."""

    preset: Literal["clip"] | None = None
    """A named objective; `clip` is InfoNCE alone."""
    terms: tuple[InfoNCEConfig, ...] = (InfoNCEConfig(),)
    """Weighted terms whose sum is minimised."""


class NegativesConfig(Section):
    """What each pair is contrasted with."""

    gather: bool = True
    """Contrast with the rows of all ranks; without it the loss depends on how the batch is cut."""


class TrainConfig(Section):
    """How long, and in what batches."""

    duration: Duration = Duration(10, "epochs")
    """Length of the run."""
    global_batch_size: Positive = 256
    """Pairs contrasted together, over all ranks and chunks."""
    micro_batch_size: Literal["auto"] | Positive = "auto"
    """Rows a rank forwards at once; `auto`: all of its share."""


class ComponentScales(Section):
    """A factor for each part of the model."""

    vision: NonNegativeFloat = 1.0
    """Image tower."""
    text: NonNegativeFloat = 1.0
    """Text tower."""
    head: NonNegativeFloat = 1.0
    """Projections."""
    fusion: NonNegativeFloat = 1.0
    """Cross-attention and its heads."""
    scale: NonNegativeFloat = 1.0
    """Logit scale."""


class OptimConfig(Section):
    """AdamW and its rates."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate after warm-up, before the scales."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay; never on norms, biases and the logit scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's epsilon."""
    warmup: Duration = Duration(100, "steps")
    """Linear rise of the rate from zero; cut to the run's length."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the rate after warm-up."""
    lr_scale: ComponentScales = ComponentScales()
    """Factors of the rate by component."""
    weight_decay_scale: ComponentScales = ComponentScales()
    """Factors of the decay by component."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null: no clipping."""


class EngineConfig(Section):
    """What runs the updates, where, and in which precision."""

    kind: Literal["auto", "deepspeed", "accelerate"] = "auto"
    """`auto`: DeepSpeed if `engine.deepspeed` is set or its launcher runs, else accelerate."""
    deepspeed: str | None = None
    """A DeepSpeed JSON with ZeRO choices; looked up here, then in the checkout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the device computes it fast, else fp32."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: CUDA, then MPS, then CPU."""
    timeout: Positive = 600
    """Seconds that a rank waits for the others in one exchange."""


class EvalConfig(Section):
    """Retrieval on held-out pairs."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    batch_size: Positive = 128
    """Rows a rank encodes at once."""


class ProbeConfig(Section):
    """Figures of the embedding space, taken while training."""

    every: Duration = Duration(50, "steps")
    """How often the global batch's embeddings are measured."""


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    keep: Positive = 2
    """How many of the newest are kept."""


class LogConfig(Section):
    """Where figures go."""

    every: Duration = Duration(1, "steps")
    """How often a training line is written."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Send the figures to Weights & Biases."""
    wandb_project: str = "mmscale"
    """Project that the figures are filed under."""


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
    engine: EngineConfig = EngineConfig()
    """DeepSpeed or accelerate."""
    eval: EvalConfig = EvalConfig()
    """Retrieval."""
    probe: ProbeConfig = ProbeConfig()
    """Health figures."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Figures."""
