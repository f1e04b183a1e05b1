"""Verbs on pairs: `synth`, `pack`, `index`, `verify`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.command import (
    DATA,
    Json,
    LeftOut,
    Workers,
    app,
    folder_out,
    reading,
    reading_places,
    say,
    tell,
    write_json,
)
from mmscale.errors import ConfigError
from mmscale.outputs import require_folder, writing

_Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the images, where it is not beside the captions.", callback=reading
    ),
]
_Columns = Annotated[
    str | None,
    typer.Option(help="Columns of a table that are not to be guessed: image=A,caption=B."),
]


@app.command(rich_help_panel=DATA)
def synth(
    out: Annotated[
        Path, typer.Option(help="Folder to write, in Flickr30k's layout.", callback=folder_out)
    ],
    images: Annotated[int, typer.Option(help="Images in all.", min=3)] = 6000,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Side of an image, pixels.", min=32)] = 96,
    mispaired: Annotated[
        float, typer.Option(help="Share of images with another's captions.", min=0, max=1)
    ] = 0.0,
    duplicates: Annotated[
        float, typer.Option(help="Share of images that repeat another's scene.", min=0, max=1)
    ] = 0.0,
    ambiguity: Annotated[
        float, typer.Option(help="Chance that a caption drops attributes.", min=0, max=1)
    ] = 0.0,
    workers: Workers = 2,
) -> int:
    """Render captioned scenes in Flickr30k's layout."""
    from mmscale.data.synth import SynthSettings, render
    from mmscale.report.console import progress_of

    settings = SynthSettings(
        images, seed, size, mispaired=mispaired, duplicates=duplicates, ambiguity=ambiguity
    )
    with progress_of("rendered") as progress, writing("--out", out):
        render(out, settings, workers, progress)
    say(f"{images:,} images with 5 captions each in {out}")
    return 0


@app.command(rich_help_panel=DATA)
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="A data set's folder, its csv, tsv, jsonl, parquet, txt or json, a recipe, such "
            "as flickr30k, or hf:ORG/NAME.",
            callback=reading,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.", callback=folder_out)],
    split: Annotated[str | None, typer.Option(help="Only this split, into OUT itself.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard.", min=1)] = 1000,
    resize: Annotated[
        int | None, typer.Option(help="Shrink to this shorter side, pixels.", min=16)
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="Encode every image anew with this quality.", min=1, max=100),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Larger images are rejected.", min=1)
    ] = 89_478_485,
    images: _Images = None,
    hold_out: Annotated[
        float,
        typer.Option(help="Share of the images for val, where nothing tells splits.", min=0, max=1),
    ] = 0.0,
    columns: _Columns = None,
    max_left_out: LeftOut = 0.5,
    part: Annotated[
        str, typer.Option(help="I/N: write only every N-th shard, from the I-th on.")
    ] = "1/1",
    workers: Workers = 2,
    json_file: Json = None,
) -> int:
    """Write images and captions to tar shards with a manifest; goes on where it stopped.

    Images keep their bytes unless --resize or --quality is given. With --part several processes,
    also on several machines, share the shards; the one that ends last writes the manifest.
    """
    from mmscale.data.pack import PackSettings
    from mmscale.data.pack import pack as run
    from mmscale.data.pack_folder import PackPart
    from mmscale.data.sources.columns import parse_columns
    from mmscale.report.console import progress_of

    chosen, asked = PackPart.parse(part), columns and parse_columns(columns)
    image_settings = (samples_per_shard, resize, quality, max_pixels, images)
    settings = PackSettings(split, *image_settings, hold_out, max_left_out, asked or None)
    with progress_of("packed") as progress:
        results = run(
            source, out, settings, workers=workers, part=chosen, progress=progress, tell=tell
        )
    for result in results:
        say(str(result))
    write_json(json_file, [{k: str(v) for k, v in asdict(result).items()} for result in results])
    return 0


@app.command(rich_help_panel=DATA)
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="A folder of tars, or tars of one folder; globs, brace lists and addresses too.",
            callback=reading_places,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the manifest, where the shards' own cannot be written.",
            callback=folder_out,
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            help="Which members are what, as data.keys: '{image: [jpg], json: [caption]}'."
        ),
    ] = None,
    max_left_out: LeftOut = 0.5,
    workers: Workers = 2,
) -> int:
    """Write a manifest for shards made elsewhere (img2dataset layout).

    Samples that cannot be used are named and left out. With --out, data.train takes that folder;
    the manifest of tars in a bucket is put beside them.
    """
    from mmscale.data.choice import parse_choice
    from mmscale.data.far import kept_here
    from mmscale.data.index import IndexSettings
    from mmscale.data.index import index as run
    from mmscale.data.named_tars import named_tars
    from mmscale.report.console import progress_of

    settings, tars = IndexSettings(max_left_out, parse_choice(keys)), named_tars(shards)
    target = out or (tars[0].parent if isinstance(tars[0], Path) else kept_here(tars[0]))
    try:
        # What cannot be read is told first.
        if isinstance(tars[0], str) or os.access(tars[0], os.R_OK, effective_ids=True):
            require_folder("", target)
    except ConfigError as error:
        raise ConfigError(f"{error}; name a folder for the manifest with --out") from error
    with progress_of("indexed") as progress, writing("", target):
        manifest = run(
            tars,
            workers,
            skipped=tell,
            progress=progress,
            tell=tell,
            out=out,
            settings=settings,
        )
    skipped = sum(shard.skipped for shard in manifest.shards)
    left_out = f", {skipped:,} samples left out" if skipped else ""
    say(f"manifest of {len(manifest.shards)} shards, {manifest.samples:,} images{left_out}")
    return 0


@app.command(rich_help_panel=DATA)
def verify(
    folder: Annotated[
        str,
        typer.Argument(help="A packed folder, or the address of one.", callback=reading_places),
    ],
    workers: Workers = 2,
    json_file: Json = None,
) -> int:
    """Check every shard against its manifest; exit 4 if anything is wrong.

    Of a folder that mmscale pack filled with several splits, each is checked.
    """
    from mmscale.data.remote import is_address
    from mmscale.data.verify import verify_all
    from mmscale.report.console import progress_of

    with progress_of("verified") as progress:
        place = folder if is_address(folder) else Path(folder)
        faults = verify_all(place, workers, progress, say)
    for fault in faults:
        say(fault)
    say(f"{len(faults)} faults" if faults else "every shard is what its manifest says")
    write_json(json_file, {"faults": faults})
    return 4 if faults else 0
