"""`python -m tools.studies NAME CONFIG key=value ...`: run a study's grid of trainings."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmscale.errors import explained
from tools.studies.experiments import run

app = typer.Typer(add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def study(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="collapse, losses, recipe or parity.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of its runs; default runs/studies/NAME.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Also write the page here.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each kind.", min=1)] = 3,
    jobs: Annotated[
        int, typer.Option(help="Processes at once; 0: all runs in this one.", min=0)
    ] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="LABEL=VALUE: only such runs; may be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here, as JSON.")
    ] = None,
) -> int:
    """Run a study's grid of trainings: NAME CONFIG key=value ...; goes on where it stopped.

    Every run shares the words; results are lines of OUT/results.jsonl, the table is OUT/page.md.
    """
    folder = out or Path("runs/studies") / name
    results, text = run(name, context.args, folder, seeds, jobs, only or ())
    print(text)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1), "utf-8")
    if page is not None:
        page.write_text(text, "utf-8")
    failed = [result.exit_code for result in results if result.error is not None]
    if failed:
        sys.stderr.write(
            f"{len(failed)} of {len(results)} runs failed; {folder}/results.jsonl says why\n"
        )
    return failed[0] if failed else 0


def main() -> int:
    """Run the words of the command line; returns the exit code."""
    return explained(lambda: app(standalone_mode=False) or 0)


if __name__ == "__main__":
    sys.exit(main())
