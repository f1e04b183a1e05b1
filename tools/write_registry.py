"""Write mmscale/model/registry.json: the figures of every curated tower and OpenCLIP configuration.

python tools/write_registry.py            everything, in about ten minutes
python tools/write_registry.py NAME...    these, and what the file does not have yet
"""

import json
import sys
from dataclasses import asdict

import open_clip

from mmscale.model.registry import FIGURES, TowerEntry, curated_names
from mmscale.model.registry_measure import measure


def names() -> list[str]:
    """Every name that the registry holds."""
    pairs = [f"openclip:{name}" for name in open_clip.list_models()]
    return [*curated_names("vision"), *curated_names("text"), *pairs]


def row(entry: TowerEntry) -> str:
    """One line: what is not known is left out."""
    known = {name: value for name, value in asdict(entry).items() if value not in (None, {})}
    return json.dumps(known)


def main(chosen: list[str]) -> None:
    kept = {}
    if chosen and FIGURES.exists():
        kept = {json.loads(line.rstrip(","))["name"]: line.rstrip(",") for line in written()}
    rows = []
    for name in names():
        if name in kept and name not in chosen:
            rows.append(kept[name])
            continue
        rows.append(row(measure(name)[0]))
        print(rows[-1], flush=True)
    FIGURES.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def written() -> list[str]:
    """Lines of entries in the file as it is."""
    return [line for line in FIGURES.read_text().splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main(sys.argv[1:])
