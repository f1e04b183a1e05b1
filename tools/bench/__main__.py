"""`python -m tools.bench NAME`: measure against open_clip, side by side in one run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmscale.errors import explained
from tools.bench import results

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="data, loss or step.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here, as JSON.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Only there: cpu or cuda (loss); else wherever it can.")
    ] = None,
) -> None:
    """Measure against open_clip, side by side in one run; needs `make peers`."""
    found = results.run(name, device)
    print(results.table(found))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results.as_json(found), indent=1), "utf-8")


def main() -> int:
    """Run the words of the command line; returns the exit code."""
    return explained(lambda: app(standalone_mode=False) or 0)


if __name__ == "__main__":
    sys.exit(main())
