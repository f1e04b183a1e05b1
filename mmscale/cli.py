"""The `mmscale` command: one thin function a verb."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.dist.signals import heeding_signals
from mmscale.errors import ConfigError, DataError, printable, saying_how_to_go_on
from mmscale.options import file_out, folder_out, reading
from mmscale.outputs import file_output, require_file, require_folder, write_output, writing

app = typer.Typer(
    help="Distributed trainer for image-text dual encoders.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Run = Annotated[
    Path, typer.Argument(help="A run folder or one of its checkpoints.", callback=reading)
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures to this file.", callback=file_out),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE", help="YAML files or presets, then settings; the later one wins."
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Where what the run names lies now, such as model.text.name=hf:FOLDER.",
    ),
]
LeftOut = Annotated[
    float,
    typer.Option(help="Share of images that may be missing or useless; 1: any.", min=0, max=1),
]
Workers = Annotated[int, typer.Option(help="Processes.", min=1)]
Data = Annotated[
    str, typer.Option("--data", help="A packed folder, or shard globs.", callback=reading)
]

_GOES_ON = "the same command goes on where it stopped"
# After a signal; train says it itself.
_WAYS_ON = {"pack": _GOES_ON, "sweep": _GOES_ON, "synth": "the same command renders it again"}


def main() -> None:
    """Entry point of the console script."""
    # Read when torch is imported: what MPS lacks runs on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    sys.exit(heeding_signals(_invoke))


def _invoke() -> int:
    # Outside click's own error handling a verb's exit code is whatever it returns.
    verb = "".join(sys.argv[1:2])
    if not verb:
        app(["--help"], standalone_mode=False)
        return 2
    with saying_how_to_go_on(lambda: _WAYS_ON.get(verb, "nothing was written")):
        try:
            return app(standalone_mode=False) or 0
        except typer.Exit as leave:
            return leave.exit_code
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        except Exception as error:
            if hasattr(error, "format_message"):
                raise ConfigError(f"{error.format_message()} (see mmscale --help)") from error
            raise


@app.command()
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
    from mmscale.data.synth import render
    from mmscale.report.progress import progress_of

    with progress_of("rendered") as progress, writing("--out", out):
        render(
            out,
            images,
            seed,
            size=size,
            mispaired=mispaired,
            duplicates=duplicates,
            ambiguity=ambiguity,
            workers=workers,
            progress=progress,
        )
    _say(f"{images:,} images with 5 captions each in {out}")
    return 0


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="A data set's folder, its csv, tsv, txt or json, or a recipe from shards/.",
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
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the images, where it is not beside the captions.", callback=reading
        ),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(help="Share of the images for val, where nothing tells splits.", min=0, max=1),
    ] = 0.0,
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
    from dataclasses import asdict

    from mmscale.data.pack import pack as run
    from mmscale.data.pack_result import Part
    from mmscale.report.progress import progress_of

    chosen = Part.parse(part)
    with progress_of("packed") as progress:
        results = run(
            source,
            out,
            split,
            samples_per_shard=samples_per_shard,
            resize=resize,
            max_pixels=max_pixels,
            workers=workers,
            progress=progress,
            quality=quality,
            part=chosen,
            tell=_tell,
            images=images,
            hold_out=hold_out,
            most_left_out=max_left_out,
        )
    for result in results:
        _say(str(result))
    _write(json_file, [{k: str(v) for k, v in asdict(result).items()} for result in results])
    return 0


@app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="A folder of tars, or tars of one folder; globs and brace lists too.",
            callback=reading,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the manifest, where the shards' own cannot be written.",
            callback=folder_out,
        ),
    ] = None,
    max_left_out: LeftOut = 0.5,
    workers: Workers = 2,
) -> int:
    """Write a manifest for shards made elsewhere (img2dataset layout).

    Samples that cannot be used are named and left out. With --out, data.train takes that folder.
    """
    from mmscale.data.index import index as run
    from mmscale.data.index import local_tars
    from mmscale.report.progress import progress_of

    tars = local_tars(shards)
    target = out or tars[0].parent
    try:
        # What cannot be read is told first.
        if os.access(tars[0], os.R_OK, effective_ids=True):
            require_folder("", target)
    except ConfigError as error:
        raise ConfigError(f"{error}; name a folder for the manifest with --out") from error
    with progress_of("indexed") as progress, writing("", target):
        manifest = run(
            tars,
            workers,
            skipped=_tell,
            progress=progress,
            tell=_tell,
            out=out,
            most_left_out=max_left_out,
        )
    skipped = sum(shard.skipped for shard in manifest.shards)
    left_out = f", {skipped:,} samples left out" if skipped else ""
    _say(f"manifest of {len(manifest.shards)} shards, {manifest.samples:,} images{left_out}")
    return 0


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A packed folder.", callback=reading)],
    workers: Workers = 2,
    json_file: Json = None,
) -> int:
    """Check every shard against its manifest; exit 4 if anything is wrong.

    Of a folder that mmscale pack filled with several splits, each is checked.
    """
    from mmscale.data.verify import verify_all
    from mmscale.report.progress import progress_of

    with progress_of("verified") as progress:
        faults = verify_all(folder, workers, progress, _say)
    for fault in faults:
        _say(fault)
    _say(f"{len(faults)} faults" if faults else "every shard is what its manifest says")
    _write(json_file, {"faults": faults})
    return 4 if faults else 0


@app.command(context_settings={"ignore_unknown_options": True})
def train(settings: Settings = None) -> int:
    """Train, as `python mmscale/train.py` does.

    For example: mmscale train demo run.dir=runs/a optim.lr=1e-3. CONFIG is a YAML file or a preset;
    without one the presets are listed. docs/settings.md lists what can be set, and mmscale schema
    prints it for editors.
    """
    from mmscale.train import main as run

    return run(settings or [])


@app.command()
def schema() -> int:
    """Print the JSON schema of the configuration, for editors that complete YAML."""
    from mmscale.config.schema import Config

    _say(json.dumps(Config.model_json_schema(), indent=1))
    return 0


@app.command("eval")
def evaluate(run: Run, data: Data, words: Words = None, json_file: Json = None) -> int:
    """Recall of both directions on held-out pairs (Karpathy's protocol)."""
    from mmscale.dist.peers import Alone
    from mmscale.evaluation import evaluate_set

    figures = evaluate_set(*_trained(run, data, words), Alone())
    width = max(map(len, figures))
    for name, value in figures.items():
        _say(f"{name:>{width}} {value:,.2f}" if "_r" in name else f"{name:>{width}} {value:,.0f}")
    _write(json_file, figures)
    return 0


@app.command()
def embed(
    run: Run,
    data: Data,
    out: Annotated[Path, typer.Option(help="The npz to write.", callback=file_out)],
    words: Words = None,
) -> int:
    """Write the embeddings of a set: image, text, image_ids, text_ids, backbone features."""
    from mmscale.diagnostics.pairs import save_npz

    pairs = _pairs(run, data, words)
    with file_output("--out", out) as aside:
        save_npz(aside, pairs)
    _say(f"{len(pairs.image):,} images and {len(pairs.text):,} captions in {out}")
    return 0


@app.command()
def doctor(
    subject: Annotated[
        Path,
        typer.Argument(help="A run, a checkpoint, or an npz of embeddings.", callback=reading),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Held-out pairs; default the run's data.eval.", callback=reading
        ),
    ] = None,
    words: Words = None,
    json_file: Json = None,
) -> int:
    """Name what is wrong with an embedding space; exit 0 if healthy, 3 if not."""
    if subject.is_file() and words:
        raise ConfigError(f"{words[0]}: {subject} holds embeddings, which no setting changes")
    from mmscale.report.verdicts import in_lines

    _require_there(subject, "run, checkpoint or npz")
    if subject.is_file():
        diagnosis = _diagnosed_npz(subject)
    else:
        diagnosis = _diagnosed_run(subject, data, words)
    for line in in_lines(diagnosis):
        _say(line)
    _write(json_file, diagnosis)
    return 0 if diagnosis["verdict"] == "healthy" else 3


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    settings: Settings = None,
    world: Annotated[int, typer.Option(help="Ranks to plan for.", min=1)] = 1,
    samples: Annotated[
        int | None, typer.Option(help="Images an epoch, where the data is not there yet.", min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of captions; default the tower's most.", min=1)
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(
            help="a100, h100, or a YAML file as config/clusters/a100.yaml.", callback=reading
        ),
    ] = "a100",
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture (PNG).", callback=file_out)
    ] = None,
    json_file: Json = None,
) -> int:
    """Predict memory, traffic and efficiency of a run, without training.

    Every figure is predicted and stands beside its formula. What could not run is refused.
    """
    from mmscale.config.cluster import read_cluster
    from mmscale.config.load import load_config
    from mmscale.engine.forecast import forecast
    from mmscale.report.forecast import as_json, tables

    planned = forecast(load_config(settings or []), world, read_cluster(cluster), samples, tokens)
    _say(tables(planned))
    _write(json_file, as_json(planned))
    if plot is not None:
        from mmscale.report.forecast_plot import draw_forecast

        write_output("--plot", plot, draw_forecast(planned))
        _say(f"picture: {plot}")
    return 0


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A model, or timm:NAME, hf:NAME_OR_PATH, openclip:NAME.", callback=reading
        ),
    ] = None,
    json_file: Json = None,
) -> int:
    """List the known towers by figure, or read one: width, input, size, licence, devices."""
    from mmscale.dist.device import FAILING_TOWERS
    from mmscale.model.registry import entries, find, unknown
    from mmscale.model.registry_table import as_json, describe, overview

    if name is None:
        _say(overview(FAILING_TOWERS))
        _write(json_file, [as_json(entry, FAILING_TOWERS) for entry in entries().values()])
        return 0
    known = find(name)
    if known is None and name.partition(":")[0] not in ("timm", "hf", "openclip"):
        raise unknown(name)
    if known is None:
        from mmscale.model.registry_measure import measure

        found = measure(name)
    else:
        found = [known]
    _say("\n\n".join(describe(entry, FAILING_TOWERS) for entry in found))
    _write(json_file, [as_json(entry, FAILING_TOWERS) for entry in found])
    return 0


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="open_clip, hf or onnx.")],
    out: Annotated[Path, typer.Option(help="Folder to write.", callback=folder_out)],
    words: Words = None,
) -> int:
    """Write a trained model in the format of OpenCLIP, Hugging Face or ONNX."""
    _require_there(run, "run or checkpoint")
    from mmscale.checkpoint.export import Exported, require_exportable
    from mmscale.checkpoint.export import export as write
    from mmscale.loading import load_on_cpu

    exported = Exported(
        *load_on_cpu(run, words or (), lambda config: require_exportable(config, to, out)), out
    )
    with writing("--out", out):
        write(exported, to)
    _say(f"{to} files in {out}")
    if (out / "README.md").exists():
        _say(f"{out / 'README.md'} says how they are loaded once they have been moved")
    return 0


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", callback=reading)],
    out: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html) or a picture (.png).", callback=file_out),
    ] = None,
    json_file: Json = None,
) -> int:
    """Put runs side by side: settings that differ, curves, last recall with spread over seeds."""
    from mmscale.report.compare import as_json, table
    from mmscale.report.compare import compare as read
    from mmscale.report.compare_page import require_kind, write_comparison

    if out is not None:
        require_kind(out)
    comparison = read(runs)
    _say(table(comparison))
    _write(json_file, as_json(comparison))
    if out is not None:
        with writing("--out", out):
            write_comparison(out, comparison)
        _say(f"comparison: {out}")
    return 0


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", callback=reading)],
    layout: Annotated[
        str | None, typer.Option("--map", help="pca, tsne or umap; default the run's log.map.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Search these shards for suspicious pairs.", callback=reading),
    ] = None,
    words: Words = None,
) -> int:
    """Write a run's report.html again, from its folder alone.

    With --data the run's model looks through that set, such as the one it was trained on, for
    captions that hardly fit and for images and captions that repeat.
    """
    if words and data is None:
        raise ConfigError(f"{words[0]}: the model is used with --data only; name the pairs")
    from mmscale.diagnostics.layout import require_layout
    from mmscale.report.page import REPORT_NAME, write_page

    if layout is not None:
        require_layout(layout)
    if run.is_dir():
        require_file("", run / REPORT_NAME)
    if data is not None:
        _search_for_suspects(run, data, words)
    _say(f"report: {write_page(run, layout).path}")
    return 0


@app.command()
def sweep(
    space: Annotated[
        Path, typer.Argument(help="The search, a YAML file (docs/sweep.md).", callback=reading)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the search; default runs/sweep/SPACE.", callback=folder_out),
    ] = None,
    workers: Annotated[int, typer.Option(help="Trainings at once.", min=1)] = 1,
    json_file: Json = None,
) -> int:
    """Search settings for the best of a metric; goes on where it stopped.

    The same command elsewhere, with the same folder, adds workers. Needs mmscale[sweep].
    """
    from mmscale.sweep.page import table, write_page
    from mmscale.sweep.workers import as_json, prepare, run_workers, trials_of

    folder = out or Path("runs/sweep") / space.stem
    require_folder("--out", folder)
    with writing("--out", folder):
        search = prepare(space, folder)
        if code := run_workers(folder, workers):
            return code
        trials = trials_of(search, folder)
        _say(table(search, trials))
        _write(json_file, as_json(search, trials))
        _say(f"page: {write_page(folder, search, trials)}")
    return 0


def _search_for_suspects(run: Path, data: str, words: list[str] | None) -> None:
    from mmscale.dist.peers import Alone
    from mmscale.evaluation import embed_set
    from mmscale.report.choosing import choose_suspects
    from mmscale.report.examples import Examples

    trained, shards = _trained(run, data, words)
    found = choose_suspects(embed_set(trained, shards, Alone()), shards, data, _tell)
    Examples.read(run).with_suspects_of(found).write(run)


def _require_there(path: Path, kind: str) -> None:
    """Refuse a path that names nothing: the command is wrong, not what it reads."""
    if not path.exists():
        raise ConfigError(f"{path}: no such {kind}; check the path")


def _diagnosed_npz(path: Path) -> dict[str, Any]:
    """Anybody's embeddings: what helps is said in words, for the settings are not ours."""
    from dataclasses import replace

    from mmscale.diagnostics.advice import in_words
    from mmscale.diagnostics.doctor import diagnose
    from mmscale.diagnostics.pairs import load_npz

    diagnosis = diagnose(load_npz(path))
    return replace(diagnosis, remedies=in_words(diagnosis.remedies)).to_json()


def _diagnosed_run(run: Path, data: str | None, words: list[str] | None) -> dict[str, Any]:
    from mmscale.diagnostics.in_training import InTraining
    from mmscale.diagnostics.of_run import Course, diagnose_run
    from mmscale.dist.peers import Alone
    from mmscale.evaluation import embed_set
    from mmscale.report.metrics import read_metrics

    trained, shards = _trained(run, data, words)
    pairs, state = embed_set(trained, shards, Alone()), trained.checkpoint.state
    log = run / "metrics.jsonl"
    own = InTraining.last_of(read_metrics(log)) if log.exists() else None
    course = Course(trained.config, state.updates, state.samples, state.position.epoch)
    return diagnose_run(pairs, course, own).to_json()


def _pairs(run: Path, data: str | None, words: list[str] | None) -> Any:
    from mmscale.dist.peers import Alone
    from mmscale.evaluation import embed_set

    return embed_set(*_trained(run, data, words), Alone())


def _trained(run: Path, data: str | None, words: list[str] | None) -> tuple[Any, Any]:
    """The model of a run or checkpoint, and the pairs to look at."""
    from mmscale.data.grouping import copies_line
    from mmscale.data.shards import open_shards
    from mmscale.evaluation import load_trained

    _require_there(run, "run or checkpoint")
    trained = load_trained(run, words or ())
    where = data or trained.config.data.eval
    if where is None:
        raise ConfigError(f"{run} was trained without data.eval; name the pairs with --data")
    try:
        shards = open_shards("--data" if data else "data.eval", where)
    except DataError as error:
        # A run may name its pairs as they lay from another working folder.
        raise (error if data else DataError(f"{error}; or name the pairs with --data")) from error
    if line := copies_line(str(where), shards.copies, shards.samples):
        _tell(line)
    return trained, shards


def _write(path: Path | None, figures: Any) -> None:
    if path is not None:
        write_output("--json", path, json.dumps(figures, indent=1).encode())


def _say(text: str) -> None:
    try:
        typer.echo(printable(text))
    except BrokenPipeError as error:
        # Whoever read the figures has what it wanted; Python would write the rest as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def _tell(text: str) -> None:
    """A line on stderr, beside the figures."""
    typer.echo(printable(text), err=True)


if __name__ == "__main__":
    main()
