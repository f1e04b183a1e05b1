"""The verb `examine`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli.command import (
    BEFORE,
    Json,
    Sets,
    Settings,
    Workers,
    app,
    reading,
    reading_places,
    say,
    tell,
    write_json,
)
from mmscale.errors import ConfigError
from mmscale.outputs import file_output, require_file, require_folder, writing

if TYPE_CHECKING:
    from mmscale.data.intake import Intake
    from mmscale.data.shards import ShardSet
    from mmscale.evaluation.examine import Examined

_SHOWN = 3
_BATCH = 1024
_PAGE, _MASK = "examined.html", "mask.json"


Examining = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A trained model that looks at the pairs: a run, a checkpoint, an export, "
        "openclip:NAME[@WEIGHTS] or hf:NAME_OR_PATH.",
        callback=reading,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="Evaluation pairs, whose pictures should not be among DATA's.", callback=reading_places
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        help="Images of the global batch that is planned; default CONFIG's, or 1024.", min=2
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Write mask.json and a page here: a folder, or a page (.html) that the mask lies "
        "beside.",
        callback=reading,
    ),
]
Prove = Annotated[
    int,
    typer.Option(
        help="Then train CONFIG with the mask and without it, with so many seeds, beside the mask.",
        min=0,
    ),
]


@app.command(rich_help_panel=BEFORE)
def examine(
    data: Annotated[
        str, typer.Argument(help="A packed folder, or shard globs.", callback=reading_places)
    ],
    words: Settings = None,
    model: Examining = None,
    against: Against = None,
    sets: Sets = None,
    batch: Batch = None,
    out: Out = None,
    prove: Prove = 0,
    workers: Workers = 2,
    json_file: Json = None,
) -> int:
    """Say what is wrong with pairs before they are trained on; exit 3 if anything is.

    Looks for useless images, the same picture twice or in --against (encoded anew, mirrored or
    cropped by a tenth), captions of many images, captions that a text tower cuts off and such in
    another script; and tells the highest R@1 that these pairs allow. With --model, or with the
    towers that CONFIG names, also for captions that belong to other images.
    """
    places = _places(out)
    if prove:
        _require_provable(prove, [*(words or ()), f"data.train={data}"], model, places)
    from mmscale.data.shards import open_shards

    shards = open_shards("DATA", data, intake=_intake(data, words if model is None else None))
    others = {name: open_shards(*place) for name, place in _held_out(against, sets).items()}
    examined = _examined(shards, others, (model, words or []), batch, workers)
    _tell(examined)
    proof: dict[str, Any] = {}
    if places is not None:
        _write(examined, shards, others, data, places)
        if prove and not any(verdict.leave_out for verdict in examined.verdicts):
            say("--prove: nothing was found that training could leave out; nothing is trained")
        elif prove:
            proof["proof"] = _prove([*(words or ()), f"data.train={data}"], places[1], prove)
    write_json(json_file, _as_json(examined) | proof)
    return 3 if examined.verdicts else 0


def _intake(data: str, words: list[str] | None) -> "Intake":
    """How DATA is taken in where it is no shards: as the configuration says, if one is named."""
    from mmscale.config.load import validate, with_words
    from mmscale.data.intake import Intake

    if not words:
        return Intake()
    return Intake.of(with_words(validate({"data": {"train": data}}), words).data)


def _examined(
    shards: "ShardSet",
    others: "dict[str, ShardSet]",
    by: tuple[str | None, list[str]],
    batch: int | None,
    workers: int,
) -> "Examined":
    """The verdicts; `by`: the model that looks, and the words beside it."""
    from mmscale.evaluation.examine import examine as run
    from mmscale.evaluation.examine import look_at
    from mmscale.evaluation.seen import load_seeing, see
    from mmscale.report.console import progress_of

    model, words = by
    loaded = load_seeing(model, words) if model is not None or words else None
    with progress_of("looked at") as progress:
        looks = look_at(shards, workers, progress)
        held_out = {name: look_at(other, workers, progress) for name, other in others.items()}
    seen = None if loaded is None else see(loaded, model is not None, shards, workers, tell)
    planned = loaded.config.train.global_batch_size if loaded and model is None else _BATCH
    return run(looks, held_out, batch or planned, seen, tell)


def _places(out: Path | None) -> tuple[Path, Path] | None:
    """The page and the mask; whether they can be written is known before the work begins."""
    if out is None:
        return None
    if out.suffix == ".html":
        require_file("--out", out)
        return out, out.with_name(_MASK)
    require_folder("--out", out)
    return out / _PAGE, out / _MASK


def _write(
    examined: "Examined",
    shards: "ShardSet",
    others: "dict[str, ShardSet]",
    data: str,
    places: tuple[Path, Path],
) -> None:
    page, mask = places
    from mmscale.data.mask import write_mask
    from mmscale.evaluation.examine import to_leave_out
    from mmscale.report.examined import write_examined

    left_out = to_leave_out(examined, shards)
    with file_output("--out", page) as aside:
        write_examined(aside, examined, shards, others, data)
    with writing("--out", mask):
        write_mask(mask, left_out)
    count = sum(map(len, left_out.values()))
    say(f"page: {page}")
    say(f"mask: {mask} leaves {count:,} images out; train with data.mask={mask}")


def _require_provable(
    seeds: int, words: list[str], model: str | None, places: tuple[Path, Path] | None
) -> None:
    """Refuse at once what would be refused after all pairs were read."""
    from mmscale.config.load import load_config

    if seeds == 1:
        raise ConfigError("--prove 1: one seed has no interval; name two or more")
    if places is None or model is not None or len(words) == 1:
        raise ConfigError(
            "--prove: trains CONFIG with mask.json, beside it; name --out and a configuration, and "
            "no --model"
        )
    if load_config(words).data.eval is None:
        raise ConfigError("--prove: compares mean recall on held-out pairs; set data.eval")


def _prove(words: list[str], mask: Path, seeds: int) -> dict[str, Any]:
    from mmscale.sweep.prove import prove

    proof = prove(words, mask, mask.parent / "prove", seeds, tell)
    low, high = proof.interval
    say(
        f"proof: without what the mask leaves out, mean recall over {seeds} seeds changes by "
        f"{proof.gain:+.2f} points ({low:+.2f} to {high:+.2f})"
    )
    return asdict(proof) | {"gain": proof.gain, "interval": proof.interval}


def _held_out(against: str | None, sets: Path | None) -> dict[str, tuple[str, Any]]:
    """For each evaluation set what names it, and where it lies."""
    from mmscale.evaluation.sets import read_sets

    found: dict[str, tuple[str, Any]] = {} if against is None else {"": ("--against", against)}
    for name, chosen in {} if sets is None else read_sets(sets).items():
        if chosen.kind == "classes":
            raise ConfigError(
                f"{sets}: {name}: is of kind classes; leakage is looked for in sets of pairs"
            )
        found[name] = f"{sets}: {name}.data", chosen.data
    return found


def _as_json(examined: "Examined") -> dict[str, Any]:
    return {
        "verdicts": [asdict(verdict) for verdict in examined.verdicts],
        "ceiling": asdict(examined.ceiling),
        "images": examined.images,
        "captions": examined.captions,
    }


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
