"""Which columns of a table hold images, captions and what else is known: asked for, or guessed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from mmscale.config.data import ColumnsConfig
from mmscale.data.caption_text import CAPTION_NAMES
from mmscale.errors import ConfigError, DataError

# Names under which images stand, as file names or as they are, best first.
IMAGE_COLUMNS = (
    "image", "image_name", "image_path", "img_path", "filename", "file_name", "filepath",
    "file_path", "path", "img", "file",
)  # fmt: skip
# Names under which only encoded images stand.
CONTENT_COLUMNS = ("jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
# What an encoded image is called, where it does not say so itself.
_NAME_COLUMNS = (*IMAGE_COLUMNS, "key", "__key__")
_URL_COLUMNS = ("url", "image_url", "img_url", "urls")
CAPTION_COLUMNS = tuple(
    dict.fromkeys(("caption", "captions", "comment", "raw", "text", "title", *CAPTION_NAMES))
)
_OTHERS = ("split", "label", "group", "image_id")


@dataclass(frozen=True)
class Columns:
    """Names of columns as a table has them.

    Attributes:
        image: File names, or encoded images.
        caption: One caption or several.
        name: What encoded images are called.
        others: `split`, `label`, `group` and `image_id`, as far as they are there.
        note: What was guessed and is not plain; empty without such.
    """

    image: str
    caption: str
    name: str | None
    others: Mapping[str, str]
    note: str = ""

    @property
    def read(self) -> list[str]:
        """Every column that is of use, once."""
        some = (self.image, self.caption, self.name, *self.others.values())
        return list(dict.fromkeys(name for name in some if name))


def parse_columns(text: str) -> ColumnsConfig:
    """From `image=filepath,caption=title`.

    Raises:
        ConfigError: It names no column, or a use that columns do not have.
    """
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    uses = {"captions" if use.strip() == "caption" else use.strip(): to for use, _, to in pairs}
    known = list(ColumnsConfig.model_fields)
    unknown = next((use for use in uses if use not in known), None)
    if unknown is not None or not pairs or not all(column.strip() for column in uses.values()):
        raise ConfigError(
            f"--columns {text}: is not a list of USE=COLUMN, such as image=filepath,caption=title; "
            f"the uses are {', '.join(known)}"
        )
    try:
        return ColumnsConfig.model_validate({use: name.strip() for use, name in uses.items()})
    except ValidationError as error:  # pragma: no cover - texts are all it takes
        raise ConfigError(f"--columns {text}: {error}") from error


def choose_columns(
    where: object,
    names: Sequence[str],
    asked: ColumnsConfig | None = None,
    encoded: Collection[str] = (),
) -> Columns:
    """Which column is what.

    Args:
        where: The table, for messages.
        names: Its columns.
        asked: What the user says; the rest is guessed by name.
        encoded: Columns of encoded images, which are taken before those of file names.

    Raises:
        DataError: A column that was asked for is not there, or none can be guessed.
    """
    asked = asked or ColumnsConfig()
    by_name = {name.lower(): name for name in reversed(names)} | {name: name for name in names}

    def wanted(use: str) -> str | None:
        name = getattr(asked, use)
        if name is None:
            return None
        if (found := by_name.get(name) or by_name.get(name.lower())) is None:
            raise DataError(
                f"{where}: has no column {name}, which was asked for as {use}; it has "
                f"{_listed(names)}"
            )
        return found

    images = [by_name[n] for n in (*IMAGE_COLUMNS, *CONTENT_COLUMNS) if by_name.get(n) in encoded]
    images += [name for name in names if name in encoded and name not in images]
    images += [by_name[n] for n in IMAGE_COLUMNS if n in by_name and by_name[n] not in images]
    captions = [by_name[n] for n in CAPTION_COLUMNS if n in by_name]
    image = wanted("image") or next(iter(images), None)
    caption = wanted("captions") or next((name for name in captions if name != image), None)
    if image is None or caption is None:
        raise DataError(_lacking(where, names, image))
    others = {use: wanted(use) or by_name.get(use) for use in _OTHERS}
    naming = [by_name[n] for n in _NAME_COLUMNS if by_name.get(n) not in (None, image, *encoded)]
    return Columns(
        image,
        caption,
        naming[0] if image in encoded and naming else None,
        {use: name for use, name in others.items() if name is not None and name != caption},
        _guessed(where, asked, image, caption, len(images) + len(captions)),
    )


def _guessed(where: object, asked: ColumnsConfig, image: str, caption: str, among: int) -> str:
    plain = (image.lower(), caption.lower().rstrip("s")) == ("image", "caption") and among == 2
    if plain or (asked.image and asked.captions):
        return ""
    return (
        f"{where}: images are taken from the column {image}, captions from {caption}; "
        "--columns image=NAME,caption=NAME, or data.columns of a run, names others"
    )


def _lacking(where: object, names: Sequence[str], image: str | None) -> str:
    url = next((name for name in names if name.lower() in _URL_COLUMNS), None)
    if image is None and url is not None:
        return (
            f"{where}: has addresses of images in {url} and no images; download them with "
            "img2dataset, and index the shards that it writes with mmscale index"
        )
    return (
        f"{where}: its columns are {_listed(names)}; it needs "
        f"one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, or say which "
        "with --columns image=NAME,caption=NAME (data.columns of a run); the columns of a text are "
        "parted by commas, semicolons, tabs or bars"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)[:200]
