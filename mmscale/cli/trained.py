"""Verbs on a trained model and on run folders, `eval` to `compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.command import (
    Data,
    Json,
    Run,
    Words,
    app,
    file_out,
    reading,
    require_there,
    say,
    tell,
    write_json,
)
from mmscale.errors import ConfigError, DataError
from mmscale.outputs import file_output, require_file, writing


@app.command("eval")
def evaluate(run: Run, data: Data, words: Words = None, json_file: Json = None) -> int:
    """Recall of both directions on held-out pairs (Karpathy's protocol)."""
    from mmscale.evaluation.retrieval import evaluate_set
    from mmscale.parallel.peers import Alone

    figures = evaluate_set(*_trained(run, data, words), Alone())
    width = max(map(len, figures))
    for name, value in figures.items():
        say(f"{name:>{width}} {value:,.2f}" if "_r" in name else f"{name:>{width}} {value:,.0f}")
    write_json(json_file, figures)
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
    say(f"{len(pairs.image):,} images and {len(pairs.text):,} captions in {out}")
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

    require_there(subject, "run, checkpoint or npz")
    if subject.is_file():
        diagnosis = _diagnosed_npz(subject)
    else:
        diagnosis = _diagnosed_run(subject, data, words)
    for line in in_lines(diagnosis):
        say(line)
    write_json(json_file, diagnosis)
    return 0 if diagnosis["verdict"] == "healthy" else 3


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

    trained, shards = _trained(run, data, words)
    found = choose_suspects(embed_set(trained, shards, Alone()), shards, data, tell)
    Examples.read(run).with_suspects_of(found).write(run)


def _diagnosed_npz(path: Path) -> dict[str, Any]:
    """Anybody's embeddings: what helps is said in words, for the settings are not ours."""
    from dataclasses import replace

    from mmscale.diagnostics.doctor import diagnose
    from mmscale.diagnostics.of_run import in_words
    from mmscale.diagnostics.pairs import load_npz

    diagnosis = diagnose(load_npz(path))
    return replace(diagnosis, remedies=in_words(diagnosis.remedies)).to_json()


def _diagnosed_run(run: Path, data: str | None, words: list[str] | None) -> dict[str, Any]:
    from mmscale.diagnostics.doctor import InTraining
    from mmscale.diagnostics.of_run import Course, diagnose_run
    from mmscale.evaluation.retrieval import embed_set
    from mmscale.parallel.peers import Alone
    from mmscale.report.metrics import read_metrics

    trained, shards = _trained(run, data, words)
    pairs, state = embed_set(trained, shards, Alone()), trained.checkpoint.state
    log = run / "metrics.jsonl"
    own = InTraining.last_of(read_metrics(log)) if log.exists() else None
    course = Course(trained.config, state.updates, state.samples, state.position.epoch)
    return diagnose_run(pairs, course, own).to_json()


def _pairs(run: Path, data: str | None, words: list[str] | None) -> Any:
    from mmscale.evaluation.retrieval import embed_set
    from mmscale.parallel.peers import Alone

    return embed_set(*_trained(run, data, words), Alone())


def _trained(run: Path, data: str | None, words: list[str] | None) -> tuple[Any, Any]:
    """The model of a run or checkpoint, and the pairs to look at."""
    from mmscale.data.grouping import copies_line
    from mmscale.data.shards import open_shards
    from mmscale.evaluation.trained import load_trained

    require_there(run, "run or checkpoint")
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
        tell(line)
    return trained, shards
