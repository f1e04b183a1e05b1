"""The verb `search`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli.command import (
    USING,
    Json,
    Model,
    app,
    file_out,
    reading,
    reading_places,
    say,
    tell,
    write_json,
)
from mmscale.errors import ConfigError
from mmscale.outputs import file_output

if TYPE_CHECKING:
    from mmscale.evaluation.search import Found

_SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)+=")
Searched = Annotated[
    str,
    typer.Option(
        "--data",
        help="A packed folder, shard globs, or a folder of image files.",
        callback=reading_places,
    ),
]
Wanted = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="WORDS KEY=VALUE",
        help="What to look for; then where what a run names lies now, as for eval.",
    ),
]
Image = Annotated[
    Path | None,
    typer.Option(help="An image to look for, alone or beside words.", callback=reading),
]
Index = Annotated[
    Path | None,
    typer.Option(
        help="Where the embeddings are kept; default RUN/search, else the user's cache.",
        callback=file_out,
    ),
]


@app.command(rich_help_panel=USING)
def search(
    model: Model,
    data: Searched,
    words: Wanted = None,
    image: Image = None,
    top: Annotated[int, typer.Option(help="Most images that are given.", min=1)] = 10,
    out: Annotated[
        Path | None, typer.Option(help="Draw a page (.html) of what is found.", callback=file_out)
    ] = None,
    index: Index = None,
    json_file: Json = None,
) -> int:
    """Find the images of a set that are closest to words or to an image.

    The images' embeddings are kept, and used again while images and model are the same.
    """
    text = " ".join(word for word in words or () if not _SETTING.match(word))
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out {out}: a page is written; let its name end in .html")
    if not text.strip() and image is None:
        raise ConfigError("nothing to look for; give words, such as a dog in the snow, or --image")
    from mmscale.data.images import open_images
    from mmscale.evaluation.image_index import IndexPlace, index_of
    from mmscale.evaluation.search import found_in, query_row
    from mmscale.evaluation.trained import load_named
    from mmscale.report.console import progress_of
    from mmscale.report.found import write_found

    loaded = load_named(model, [word for word in words or () if _SETTING.match(word)])
    images = open_images("--data", data)
    query = query_row(loaded, text, image, tell)
    place = IndexPlace.beside(model) if index is None else IndexPlace(index, True)
    with progress_of("encoded") as progress:
        embedded = index_of(loaded, images, place, tell, progress)
    found = found_in(embedded, query, top)
    _tell_found(found)
    write_json(json_file, [_as_json(entry) for entry in found])
    if out is not None:
        with file_output("--out", out) as aside:
            searched = len(embedded.image)
            write_found(
                aside, found, images, text, image, model=model, data=data, searched=searched
            )
        say(f"page: {out}")
    return 0


def _tell_found(found: "list[Found]") -> None:
    for rank, entry in enumerate(found, 1):
        say(f"{rank:>{len(str(len(found)))}} {entry.score:.4f} {entry.key}")
        for caption in entry.captions:
            say(f"    {caption}")


def _as_json(entry: "Found") -> dict[str, Any]:
    return {"key": entry.key, "score": entry.score, "captions": list(entry.captions)}
