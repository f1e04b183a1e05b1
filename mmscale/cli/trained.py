"""Verbs on a trained model and on run folders, `eval` to `compare`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.command import (
    LOOKING,
    USING,
    AnyData,
    HeldOutData,
    Json,
    Model,
    Sets,
    Words,
    app,
    file_out,
    reading,
    reading_places,
    require_there,
    say,
    tell,
    write_json,
)
from mmscale.errors import ConfigError, DataError
from mmscale.outputs import file_output, require_file, require_folder, writing

# Models that are no folder here.
_ELSEWHERE = ("openclip:", "hf:")


@app.command("eval", rich_help_panel=LOOKING)
def evaluate(
    model: Model,
    words: Words = None,
    data: AnyData = None,
    sets: Sets = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            help="Classify labelled images: a file of the classes, or imagenet.",
            callback=reading,
        ),
    ] = None,
    json_file: Json = None,
) -> int:
    """Recall of both directions on held-out pairs (Karpathy's protocol), or zero-shot accuracy."""
    from mmscale.config.evaluation import COUNTS

    _require_one_of(f"eval {model}", data, sets)
    if classes is not None and data is None:
        raise ConfigError("--classes: has an effect only with --data; a set of --sets has its own")
    figures = _figures(model, words, data, sets, classes)
    said = {
        (f"{name}/{figure}" if isinstance(found, dict) else name): value
        for name, found in figures.items()
        for figure, value in (found.items() if isinstance(found, dict) else [("", found)])
    }
    width = max(map(len, said))
    for name, value in said.items():
        is_count = name.rpartition("/")[2] in COUNTS
        say(f"{name:>{width}} {value:,.0f}" if is_count else f"{name:>{width}} {value:,.2f}")
    write_json(json_file, figures)
    return 0


@app.command(rich_help_panel=USING)
def embed(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="The npz to write; of --sets a folder of them.", callback=reading),
    ],
    words: Words = None,
    data: AnyData = None,
    sets: Sets = None,
) -> int:
    """Write the embeddings of a set: image, text, image_ids, text_ids, backbone features."""
    _require_one_of(f"embed {model}", data, sets)
    if sets is None:
        require_file("--out", out)
    else:
        require_folder("--out", out)
    from mmscale.diagnostics.pairs import save_npz

    _, found = _with_embedded(model, words, data, sets)
    for name, pairs in found:
        path = out if sets is None else out / f"{name}.npz"
        with file_output("--out", path) as aside:
            save_npz(aside, pairs)
        say(f"{len(pairs.image):,} images and {len(pairs.text):,} captions in {path}")
    return 0


@app.command(rich_help_panel=LOOKING)
def doctor(
    subject: Annotated[
        str,
        typer.Argument(
            help="A run, checkpoint, export, openclip:NAME[@WEIGHTS], hf:NAME_OR_PATH, or an npz "
            "of embeddings.",
            callback=reading,
        ),
    ],
    data: HeldOutData = None,
    sets: Sets = None,
    words: Words = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a page (.html) of it.", callback=file_out)
    ] = None,
    json_file: Json = None,
) -> int:
    """Name what is wrong with an embedding space; exit 0 if healthy, 3 if not.

    With --sets each set of pairs has a verdict, and all must be healthy.
    """
    if data is not None and sets is not None:
        raise ConfigError(f"doctor {subject}: --sets names its own pairs; leave --data out")
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out {out}: must end with .html; rename it")
    if not subject.startswith(_ELSEWHERE):
        require_there(Path(subject), "run, checkpoint or npz")
    from mmscale.report.verdicts import in_lines

    if Path(subject).is_file():
        _require_bare_npz(subject, words, data, sets)
        found = [_diagnosed_npz(Path(subject))]
    else:
        found = list(_diagnosed_model(subject, words, data, sets, kept=out is not None))
    diagnoses = {name: diagnosis for name, _, diagnosis in found}
    for name, diagnosis in diagnoses.items():
        for line in in_lines(diagnosis):
            say(f"{name}: {line}" if name else line)
    write_json(json_file, diagnoses if sets else diagnoses[""])
    if out is not None:
        from mmscale.report.diagnosis_page import write_diagnoses

        with file_output("--out", out) as aside:
            write_diagnoses(aside, _title(subject), found)
        say(f"page: {out}")
    return 0 if all(each["verdict"] == "healthy" for each in diagnoses.values()) else 3


@app.command(rich_help_panel=LOOKING)
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", callback=reading)],
    layout: Annotated[
        str | None, typer.Option("--map", help="pca, tsne or umap; default the run's log.map.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Search these shards for suspicious pairs.", callback=reading_places
        ),
    ] = None,
    words: Words = None,
) -> int:
    """Write a run's report.html again, from its folder alone.

    With --data the run's model looks through that set, such as the one it was trained on, for
    captions that hardly fit and for images and captions that repeat.
    """
    if words and data is None:
        raise ConfigError(f"{words[0]}: the model is used with --data only; name the pairs")
    from mmscale.diagnostics.space import require_layout
    from mmscale.report.page import REPORT_NAME, write_page

    if layout is not None:
        require_layout(layout)
    if run.is_dir():
        require_file("", run / REPORT_NAME)
    if data is not None:
        _search_for_suspects(run, data, words)
    say(f"report: {write_page(run, layout).path}")
    return 0


@app.command(rich_help_panel=LOOKING)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", callback=reading)],
    out: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html) or a picture (.png).", callback=file_out),
    ] = None,
    json_file: Json = None,
) -> int:
    """Put runs side by side: settings that differ, curves, last recall with spread over seeds."""
    from mmscale.report.compare import compare as read
    from mmscale.report.compare import comparison_json, comparison_table
    from mmscale.report.compare_page import require_kind, write_comparison

    if out is not None:
        require_kind(out)
    comparison = read(runs)
    say(comparison_table(comparison))
    write_json(json_file, comparison_json(comparison))
    if out is not None:
        with writing("--out", out):
            write_comparison(out, comparison)
        say(f"comparison: {out}")
    return 0


def _search_for_suspects(run: Path, data: str, words: list[str] | None) -> None:
    from mmscale.evaluation.retrieval import embed_set
    from mmscale.parallel.peers import Alone
    from mmscale.report.examples import Examples, choose_suspects

    trained, shards = _with_pairs(str(run), data, words)
    found = choose_suspects(embed_set(trained, shards, Alone()), shards, data, tell)
    Examples.read(run).with_suspects_of(found).write(run)


def _figures(
    model: str,
    words: list[str] | None,
    data: str | None,
    sets: Path | None,
    classes: str | None,
) -> dict[str, Any]:
    """Figures by name; of several sets by set."""
    from mmscale.evaluation.retrieval import evaluate_set
    from mmscale.evaluation.sets import classify_set, evaluate_model, read_sets
    from mmscale.evaluation.trained import load_named
    from mmscale.parallel.peers import Alone

    if sets is not None:
        chosen = read_sets(sets)
        found = evaluate_model(load_named(model, words or ()), chosen)
        return {name: evaluated.figures for name, evaluated in found.items()}
    if classes is not None:
        assert data is not None, "it was looked at"
        return classify_set(load_named(model, words or ()), data, classes)
    return evaluate_set(*_with_pairs(model, data, words), Alone())


def _title(subject: str) -> str:
    """Of a page: the file, the run or the run's checkpoint, without the folders above."""
    path = Path(subject).resolve()
    if not path.exists():
        return subject
    is_checkpoint = path.parent.name == "checkpoints"
    return str(Path(*path.parts[-3:])) if is_checkpoint else path.name


def _require_one_of(command: str, data: str | None, sets: Path | None) -> None:
    if (data is None) == (sets is None):
        raise ConfigError(f"{command}: name the pairs with --data, or several sets with --sets")


def _require_bare_npz(
    path: str, words: list[str] | None, data: str | None, sets: Path | None
) -> None:
    """Refuse what would have no effect on embeddings."""
    named = f"--data {data}" if data else f"--sets {sets}" if sets else "".join(words or ()[:1])
    if named:
        raise ConfigError(
            f"{named}: {path} holds embeddings, which no setting and no other pairs change; leave "
            "it out"
        )


def _diagnosed_npz(path: Path) -> tuple[str, Any, dict[str, Any]]:
    from mmscale.diagnostics.of_run import diagnose_alone
    from mmscale.diagnostics.pairs import load_npz

    pairs = load_npz(path)
    return "", pairs, diagnose_alone(pairs).to_json()


def _diagnosed_model(
    model: str, words: list[str] | None, data: str | None, sets: Path | None, kept: bool
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each set's name, its pairs where they are `kept`, and its diagnosis; no name: no `--sets`."""
    loaded, found = _with_embedded(model, words, data, sets)
    for name, pairs in found:
        yield name, pairs if kept else None, _diagnosed(model, loaded, pairs)


def _diagnosed(model: str, loaded: Any, pairs: Any) -> dict[str, Any]:
    from mmscale.checkpoint.state import BLEND
    from mmscale.diagnostics.doctor import InTraining
    from mmscale.diagnostics.forgetting import Forgetting
    from mmscale.diagnostics.of_run import Course, diagnose_alone, diagnose_run
    from mmscale.evaluation.trained import Trained
    from mmscale.report.metrics import read_metrics

    if not isinstance(loaded, Trained):
        return diagnose_alone(pairs).to_json()
    state, log = loaded.checkpoint.state, Path(model) / "metrics.jsonl"
    own = InTraining.last_of(read_metrics(log)) if log.exists() else None
    forgetting = None
    if log.exists() and BLEND not in loaded.checkpoint.parts:
        forgetting = Forgetting.last_of(read_metrics(log), loaded.config.retain)
    course = Course(loaded.config, state.updates, state.samples, state.position.epoch, forgetting)
    return diagnose_run(pairs, course, own).to_json()


def _with_embedded(
    model: str, words: list[str] | None, data: str | None, sets: Path | None
) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """A model, and the pairs of each set that it is looked at on, by name: one, or `--sets`."""
    from mmscale.evaluation.retrieval import embed_set
    from mmscale.evaluation.sets import embedded_sets, read_sets
    from mmscale.evaluation.trained import load_named
    from mmscale.parallel.peers import Alone

    if sets is not None:
        chosen = read_sets(sets)
        loaded = load_named(model, words or ())
        return loaded, embedded_sets(str(sets), loaded, chosen, tell)
    loaded, shards = _with_pairs(model, data, words)
    return loaded, iter([("", embed_set(loaded, shards, Alone()))])


def _with_pairs(model: str, data: str | None, words: list[str] | None) -> tuple[Any, Any]:
    """A model, and the pairs to look at."""
    from mmscale.data.grouping import copies_line
    from mmscale.data.shards import open_held_out
    from mmscale.evaluation.trained import Trained, load_named

    loaded = load_named(model, words or ())
    try:
        shards = open_held_out("--data", data, loaded.config.data)
    except DataError as error:
        # A run may name its pairs as they lay from another working folder.
        raise (error if data else DataError(f"{error}; or name the pairs with --data")) from error
    if shards is None:
        is_run = isinstance(loaded, Trained)
        why = f"{model} was trained without data.eval" if is_run else f"{model} is no run"
        raise ConfigError(f"{why}; name the pairs with --data")
    where = data or loaded.config.data.eval
    if line := copies_line(str(where), shards.copies, shards.samples):
        tell(line)
    return loaded, shards
