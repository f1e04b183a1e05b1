"""Settings of the data: where pairs come from, how they are drawn, and what is made of them."""

import warnings
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mmscale.config.paths import FAULT, PathSetting, PlacesSetting, expand_places
from mmscale.config.values import Positive, PositiveFloat, Ramp, Section, within


class SourceConfig(Section):
    """One of several sources of training pairs."""

    shards: PlacesSetting
    """Packed folder, globs, brace lists or URLs of tars, as for `data.train`."""
    weight: PositiveFloat = 1.0
    """How often an epoch shows each sample: the whole part in so many passes, of the fraction that
    share of one more, anew each epoch. With `resampled`: how often a shard is drawn."""


def _explained(value: Any) -> Any:
    """The value; what is wrong with an entry is told in one sentence, not once an alternative."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return value
    for number, entry in enumerate(value):
        try:
            SourceConfig.model_validate(entry)
        except ValidationError as error:
            fault = error.errors()[0]
            # What follows a name says which type of several was tried.
            name = str(fault["loc"][0]) if fault["loc"] else "it"
            rule = str(fault["msg"])
            if fault["type"] != FAULT:
                rule = rule.removeprefix("Input should be ").lower()
            raise ValueError(
                f"a list of {{shards: PLACE, weight: NUMBER}}; in entry {number}, {name}: {rule}"
            ) from error
    return value


Sources = Annotated[
    str | list[str] | list[SourceConfig],
    BeforeValidator(_explained),
    BeforeValidator(expand_places),
]


# As `table`: the run's own model.
OWN_MODEL = "self"


class HardBatchesConfig(Section):
    """Images that are hard to tell apart, brought into one batch."""

    table: PathSetting | None = None
    """npz of `mmscale embed`, or npz/safetensors of `image_ids` and `neighbours`; `self`: what the
    model finds alike as the run or stage begins; null: off."""
    by: Literal["image", "text"] = "image"
    """Which embeddings of `table` are compared, where it holds no `neighbours`."""
    share: Annotated[Ramp, within(0, 1)] = Ramp.constant(0.5)
    """Share of a batch's images brought in as neighbours of others; a ramp counts the data's own
    batches, from the run's first."""
    window: Positive = 32
    """Batches among which images change places, for `data.positive_share` too."""


class ColumnsConfig(Section):
    """Names of a table's columns; what is null is guessed by name, and told."""

    image: str | None = None
    """File names of images, or the images as they are."""
    captions: str | None = None
    """A caption, or several as a list."""
    split: str | None = None
    """`train`, `val` or `test`; default the column `split`."""
    label: str | None = None
    """Class of the image; default the column `label`."""
    group: str | None = None
    """Images that count as one, with `data.match=group`; default the column `group`."""
    image_id: str | None = None
    """The image's own number; default the column `image_id`."""


def weighted(entry: str) -> tuple[str, float | None]:
    """Name and share of `NAME` or `NAME:SHARE`."""
    name, colon, share = entry.rpartition(":")
    try:
        return (name, float(share)) if colon else (entry, None)
    except ValueError:
        # A name with a colon in it.
        return entry, None


with warnings.catch_warnings():
    # Pydantic had a method of the name `json` once.
    warnings.simplefilter("ignore", UserWarning)

    class KeysConfig(Section):
        """Members of a sample in foreign shards; what is empty goes by its usual name."""

        image: tuple[str, ...] = ()
        """Endings of images, best first; `*`: what begins as a JPEG, PNG or WebP."""
        text: tuple[str, ...] = ()
        """Endings of texts that are captions; with `json` or several, each turn draws one of them;
        `txt:0.3` in three turns of ten."""
        json: tuple[str, ...] = ()  # type: ignore[assignment]
        """Names in the json member that captions stand under, drawn as `text` is."""
        lines: bool = False
        """Each line of a text is a caption."""

        @field_validator("image", "text")
        @classmethod
        def _are_endings(cls, names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.lower().removeprefix(".") for name in names)

        @model_validator(mode="after")
        def _is_whole(self) -> "KeysConfig":
            named = [name for name, _ in map(weighted, (*self.image, *self.text, *self.json))]
            if not all(named):
                raise ValueError("a name is empty; name endings of members, or names in the json")
            for entries in (self.image, self.text, self.json):
                names = [name for name, _ in map(weighted, entries)]
                if len(set(names)) < len(names):
                    raise ValueError(f"{', '.join(entries)} names one twice; name each once")
            if self.lines and not (self.text or self.json):
                raise ValueError("lines is of the captions in text and json; name them there")
            given = [share for _, share in map(weighted, (*self.text, *self.json))]
            known = [share for share in given if share is not None]
            total = sum(known)
            is_full = abs(total - 1) < 1e-6
            if not all(0 < share <= 1 for share in known) or not (
                is_full if known and len(known) == len(given) else total < 1
            ):
                raise ValueError(
                    "the shares of text and json are above 0 and 1 together; what has none shares "
                    "what is left"
                )
            return self

        @property
        def words(self) -> str:
            """Every name that is given, in a line."""
            given = (f"{name}: {', '.join(v)}" for name, v in self if v and name != "lines")
            return "; ".join([*given, *["lines"] * self.lines]) or "the usual names"

        def shares(self) -> list[tuple[str, float]]:
            """Each name of `text`, then of `json`, with how often captions are drawn from it."""
            given = list(map(weighted, (*self.text, *self.json)))
            known = [share for _, share in given if share is not None]
            left = (1 - sum(known)) / max(1, len(given) - len(known))
            return [(name, left if share is None else share) for name, share in given]


class DataConfig(Section):
    """The training and evaluation streams."""

    train: Sources
    """Packed folder with its manifest, globs or brace lists of tars beside one, `https`, `s3`,
    `gs`, `az` or `hf://datasets/` addresses of either, or a list of such; or sources with weights:
    `[{shards: a, weight: 2}, {shards: b}]`."""
    eval: PlacesSetting | None = None
    """Packed folder of held-out pairs; without it and `eval.sets` nothing is evaluated."""
    cache: PathSetting | None = None
    """Folder of what is packed of tables, folders of images and Hub sets; default `.mmscale` beside
    them, or the user's cache."""
    columns: ColumnsConfig = ColumnsConfig()
    """Columns of a table."""
    keys: KeysConfig = KeysConfig()
    """Members of foreign shards; as they were indexed, or without a manifest."""
    mask: PathSetting | None = None
    """File of ids of images that `data.train` leaves out: a JSON list, an id a line, or what
    `mmscale examine` wrote."""
    hold_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a table's images that `data.eval` takes and `data.train` leaves; where nothing tells
    splits."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` in `data.train` run the command; what it writes is the shard."""
    resampled: bool = False
    """Draw shards with replacement and read each to its end, without a manifest. The order still
    follows from the position; going on in mid-epoch reads the epoch's part before it again."""
    epoch_samples: Positive | None = None
    """With `resampled`: images that count as an epoch; default the first shard's times shards."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = 2
    """Decoding processes a rank; 0 decodes in the training process; `auto`: from the cores and
    ranks of the machine, where there is an accelerator."""
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

    @model_validator(mode="before")
    @classmethod
    def _evaluate_what_is_held_out(cls, given: Any) -> Any:
        """With `hold_out` alone the same table is evaluated on."""
        if isinstance(given, dict) and given.get("hold_out") and given.get("eval") is None:
            return {**given, "eval": given.get("train")}
        return given

    @field_validator("hold_out")
    @classmethod
    def _is_of_one_table(cls, share: float | None, info: ValidationInfo) -> float | None:
        if share is not None and info.data.get("train") != info.data.get("eval"):
            raise ValueError(
                "held out of data.train for data.eval; name the same table there or leave it away"
            )
        return share

    @property
    def rows_per_item(self) -> int:
        """Rows that one turn of a sample gives to a batch: k where `captions` is k."""
        return self.captions if isinstance(self.captions, int) else 1
