"""The verb `examine`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mmscale.cli.command import BEFORE, Json, Workers, app, reading_places, say, write_json

if TYPE_CHECKING:
    from mmscale.evaluation.examine import Examined

_SHOWN = 3


@app.command(rich_help_panel=BEFORE)
def examine(
    data: Annotated[
        str, typer.Argument(help="A packed folder, or shard globs.", callback=reading_places)
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Evaluation pairs, whose pictures should not be among DATA's.",
            callback=reading_places,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Images of the global batch that is planned.", min=2)
    ] = 1024,
    workers: Workers = 2,
    json_file: Json = None,
) -> int:
    """Say what is wrong with pairs before they are trained on; exit 3 if anything is.

    Looks for useless images, the same picture twice or in --against (encoded anew, mirrored or
    cropped by a tenth), captions of many images, captions longer than CLIP's 77 tokens; and tells
    the highest R@1 that these pairs allow.
    """
    from mmscale.data.shards import open_shards
    from mmscale.evaluation.examine import examine as run
    from mmscale.evaluation.examine import look_at
    from mmscale.report.console import progress_of

    shards = open_shards("DATA", data)
    others = None if against is None else open_shards("--against", against)
    with progress_of("looked at") as progress:
        looks = look_at(shards, workers, progress)
        other_looks = None if others is None else look_at(others, workers, progress)
    examined = run(looks, other_looks, batch)
    _tell(examined)
    write_json(
        json_file,
        {
            "verdicts": [asdict(verdict) for verdict in examined.verdicts],
            "ceiling": asdict(examined.ceiling),
            "images": examined.images,
            "captions": examined.captions,
        },
    )
    return 3 if examined.verdicts else 0


def _tell(examined: "Examined") -> None:
    for verdict in examined.verdicts:
        low, high = verdict.interval
        say(f"{verdict.verdict}: {verdict.sentence} ({low:.2%} to {high:.2%})")
        for example in verdict.examples[:_SHOWN]:
            beside = "" if example.partner is None else f" and {example.partner}"
            say(f"    {example.key}{beside}: {example.what}")
        say(f"    {verdict.remedy}")
    if not examined.verdicts:
        say(f"nothing was found in {examined.images:,} images and {examined.captions:,} captions")
    most = examined.ceiling
    say(f"highest R@1 on these pairs: i2t {most.i2t_r1:.1f}, t2i {most.t2i_r1:.1f}")
