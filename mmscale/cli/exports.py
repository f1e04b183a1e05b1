"""Verbs that hand a trained model to other tools: `export`, `push`."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.command import (
    USING,
    Run,
    Words,
    app,
    folder_out,
    reading_places,
    require_there,
    say,
    tell,
)
from mmscale.errors import ConfigError, DataError
from mmscale.outputs import writing

To = Annotated[str, typer.Option(help="open_clip, hf, onnx, sentence_transformers, adapter, clip.")]


@app.command(rich_help_panel=USING)
def export(
    run: Run,
    to: To,
    out: Annotated[Path, typer.Option(help="Folder to write.", callback=folder_out)],
    words: Words = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --to onnx: matrices in a byte a number.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="With --int8: pairs on which its cost is measured; default the run's data.eval.",
            callback=reading_places,
        ),
    ] = None,
) -> int:
    """Write a trained model in the format of OpenCLIP, Hugging Face, ONNX and others.

    With --int8 it is told how far embeddings and recall differ from those of the model itself.
    """
    require_there(run, "run or checkpoint")
    if int8 and to != "onnx":
        raise ConfigError(f"--int8 --to {to}: only onnx has it; give --to onnx, or leave it out")
    if data is not None and not int8:
        raise ConfigError(f"--data {data}: only --int8 measures something on it; leave it out")
    from mmscale.checkpoint.export import export as write

    exported, _ = _loaded(run, to, out, words)
    if int8:
        exported = _with_cost(exported, data)
    with writing("--out", out):
        write(exported, to)
    say(f"{to} files in {out}")
    if int8:
        from mmscale.evaluation.quantised import cost_lines

        say("\n".join(cost_lines(json.loads((out / "mmscale.json").read_text("utf-8"))["int8"])))
    if (out / "README.md").exists():
        say(f"{out / 'README.md'} says how they are loaded once they have been moved")
    return 0


@app.command(rich_help_panel=USING)
def push(
    run: Run,
    page: Annotated[
        str | None, typer.Argument(metavar="REPO", help="The page, ORG/NAME; --repo is the same.")
    ] = None,
    words: Words = None,
    repo: Annotated[str | None, typer.Option(hidden=True)] = None,
    to: To = "open_clip",
    private: Annotated[
        bool, typer.Option("--private", help="Make a new page private; one that is there stays.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; default the page's main one.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="The hub's name of a licence, such as apache-2.0."),
    ] = None,
) -> int:
    """Export a trained model to a page of the Hugging Face hub, with a model card from its run.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    require_there(run, "run or checkpoint")
    from mmscale.checkpoint.export import export as write
    from mmscale.checkpoint.push import push_folder, require_page
    from mmscale.report.card import Pushed, model_card

    if repo is not None:
        page, words = repo, [*([page] if page else []), *(words or [])]
    if page is None:
        raise ConfigError(f"push {run}: name the page that it goes to, ORG/NAME")
    require_page(page)
    with tempfile.TemporaryDirectory() as made:
        out = Path(made, "files")
        exported, checkpoint = _loaded(run, to, out, words, page)
        card = model_card(Pushed(page, to, revision, licence), checkpoint, exported.spec)
        write(exported, to)
        (out / "README.md").write_text(card, "utf-8")
        address = push_folder(out, page, private, revision)
    say(f"{to} files at {address}")
    return 0


def _loaded(
    run: Path, to: str, out: Path, words: list[str] | None, page: str | None = None
) -> tuple[Any, Any]:
    """What is exported, and the checkpoint that it comes from."""
    from mmscale.checkpoint.export import Exported, require_exportable
    from mmscale.evaluation.trained import load_trained
    from mmscale.model.dual_encoder import DualEncoder

    trained = load_trained(run, words or (), lambda config: require_exportable(config, to, out))
    encoder = DualEncoder(trained.model.cpu().float(), trained.spec.pad_token)
    return Exported(trained.config, encoder, trained.spec, out, page), trained.checkpoint


def _with_cost(exported: Any, data: str | None) -> Any:
    """With what measures the cost of int8: on pairs if some are at hand."""
    from mmscale.data.shards import open_held_out
    from mmscale.evaluation.quantised import cost_on_pairs, cost_on_sample

    config = exported.config
    try:
        shards = open_held_out("--data", data, config.data)
    except DataError as error:
        if data:
            raise
        tell(f"warning: {error}: the recall that int8 costs is not measured; name pairs by --data")
        shards = None
    if shards is None:
        return replace(exported, int8=cost_on_sample(exported))
    return replace(exported, int8=cost_on_pairs(config, exported.spec, shards))
