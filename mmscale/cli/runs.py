"""Verbs that begin runs or foretell them (`train`, `plan`, `sweep`), and what these need."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.command import (
    BEFORE,
    TRAINING,
    Json,
    Settings,
    app,
    file_out,
    folder_out,
    reading,
    say,
    write_json,
)
from mmscale.errors import ConfigError
from mmscale.outputs import require_folder, write_output, writing

# In a checkout a link to the folder at its top; in a wheel the files themselves.
_SLURM = Path(__file__).parents[1] / "slurm"


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=TRAINING)
def train(settings: Settings = None) -> int:
    """Train, as `python mmscale/train.py` does.

    For example: mmscale train demo run.dir=runs/a optim.lr=1e-3. CONFIG is a YAML file or a preset;
    without one the presets are listed. docs/settings.md lists what can be set, and mmscale schema
    prints it for editors.
    """
    from mmscale.train import main as run

    return run(settings or [])


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=BEFORE)
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
            help="a100, a100_40gb, h100, rtx4090, or a YAML file like theirs.", callback=reading
        ),
    ] = "a100",
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture (PNG).", callback=file_out)
    ] = None,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Show how each figure is worked out.")
    ] = False,
    json_file: Json = None,
) -> int:
    """Predict memory, traffic and efficiency of a run, without training.

    For example: mmscale plan flickr30k --world 16 --samples 29000 train.global_batch_size=4096.
    First it says whether the run fits and how long it takes. What could not run is refused.
    """
    from mmscale.config.cluster import read_cluster
    from mmscale.config.load import load_config
    from mmscale.engine.forecast import forecast
    from mmscale.report.forecast import plan_json, tables

    planned = forecast(load_config(settings or []), world, read_cluster(cluster), samples, tokens)
    say(tables(planned, formulas))
    write_json(json_file, plan_json(planned))
    if plot is not None:
        from mmscale.report.forecast_plot import draw_forecast

        write_output("--plot", plot, draw_forecast(planned))
        say(f"picture: {plot}")
    return 0


@app.command(rich_help_panel=BEFORE)
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
    from mmscale.model.registry import describe_tower, entries, entry_json, find, overview, unknown
    from mmscale.parallel.device import FAILING_TOWERS

    if name is None:
        say(overview(FAILING_TOWERS))
        write_json(json_file, [entry_json(entry, FAILING_TOWERS) for entry in entries().values()])
        return 0
    known = find(name)
    if known is None and name.partition(":")[0] not in ("timm", "hf", "openclip"):
        raise unknown(name)
    if known is None:
        from mmscale.model.registry_measure import measure

        found = measure(name)
    else:
        found = [known]
    say("\n\n".join(describe_tower(entry, FAILING_TOWERS) for entry in found))
    write_json(json_file, [entry_json(entry, FAILING_TOWERS) for entry in found])
    return 0


@app.command(rich_help_panel=BEFORE)
def fetch(settings: Settings = None) -> int:
    """Bring the weights and tokenizers that a run needs from the hub into the cache.

    For example, where there is a network: mmscale fetch flickr30k. Jobs without one then start with
    the same HF_HOME and HF_HUB_OFFLINE=1. A lone openclip:NAME@WEIGHTS or hf:NAME is fetched too.
    """
    from mmscale.config.load import load_config
    from mmscale.evaluation.trained import load_named
    from mmscale.report.forecast import bytes_as_text
    from mmscale.training.fetch import cache_folder, cached_pages, fetch_for

    words = settings or []
    before = cached_pages()
    if len(words) == 1 and words[0].startswith(("openclip:", "hf:")):
        load_named(words[0])
    else:
        fetch_for(load_config(words))
    after = cached_pages()
    for page in sorted(after.keys() - before.keys()):
        say(f"{page}: {bytes_as_text(after[page])}")
    say(f"all that is needed of the hub lies in {cache_folder()}")
    return 0


@app.command(rich_help_panel=BEFORE)
def schema() -> int:
    """Print the JSON schema of the configuration, for editors that complete YAML."""
    from mmscale.config.schema import Config

    say(json.dumps(Config.model_json_schema(), indent=1))
    return 0


@app.command(rich_help_panel=TRAINING)
def sbatch(
    script: Annotated[
        str | None, typer.Argument(help="train, pack, eval or sweep; none: all are listed.")
    ] = None,
) -> int:
    """Print where a job's script for SLURM lies: sbatch OPTIONS "$(mmscale sbatch train)" ..."""
    files = {file.stem: file for file in sorted(_SLURM.iterdir())}
    if script is None:
        say("\n".join(str(file) for file in files.values()))
        return 0
    if script not in files:
        raise ConfigError(f"{script}: no such script; there are {', '.join(files)}")
    say(str(files[script]))
    return 0


@app.command(rich_help_panel=TRAINING)
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
    from mmscale.sweep.page import sweep_table, write_sweep_page
    from mmscale.sweep.workers import prepare, run_workers, sweep_json, trials_of

    folder = out or Path("runs/sweep") / space.stem
    require_folder("--out", folder)
    with writing("--out", folder):
        search = prepare(space, folder)
        if code := run_workers(folder, workers):
            return code
        trials = trials_of(search, folder)
        say(sweep_table(search, trials))
        write_json(json_file, sweep_json(search, trials))
        say(f"page: {write_sweep_page(folder, search, trials)}")
    return 0
