"""The registry in words: tables for the whole of it, lines for one model."""

from collections.abc import Iterable, Sequence
from typing import Any

from mmscale.model.presets import PRESETS
from mmscale.model.registry import Entry, curated_names, entries

GOOD_ON = "cpu"  # where each pair of curated towers was trained (docs/models.md)


def overview(failing: dict[str, dict[str, str]]) -> str:
    """Curated towers, presets and OpenCLIP's models.

    Args:
        failing: By kind of device, towers that are known to fail there.
    """
    known = entries()
    vision = [known[name] for name in curated_names("vision")]
    text = [known[name] for name in curated_names("text")]
    pairs = [entry for entry in known.values() if entry.part == "pair"]
    return "\n\n".join(
        [
            "Image towers (model.vision.name)\n" + table(vision, failing),
            "Text towers (model.text.name)\n" + table(text, failing),
            "Presets (model.preset)\n" + presets(),
            "OpenCLIP's models (model.preset)\n" + table(pairs, failing),
            "FLOPs: one sample forward, two for each multiply-add; a caption of 77 tokens, or of "
            "the tower's own length if\nthat is shorter. Memory: the weights in fp32. Any other "
            "model is read: mmscale models timm:NAME or hf:NAME_OR_PATH",
        ]
    )


def table(chosen: Sequence[Entry], failing: dict[str, dict[str, str]]) -> str:
    """One line a model."""
    rows = [columns(entry, failing) for entry in chosen]
    return aligned([list(rows[0]), *(list(row.values()) for row in rows)])


def columns(entry: Entry, failing: dict[str, dict[str, str]]) -> dict[str, str]:
    """Heading -> cell of one model."""
    cells = {"name": entry.name, "width": str(entry.width)}
    if entry.image_size is not None:
        cells |= {"pixels": str(entry.image_size), "mean": triple(entry.mean)}
        cells |= {"std": triple(entry.std), "image tokens": str(entry.image_tokens)}
    if entry.context_length is not None:
        cells |= {"context": str(entry.context_length), "vocabulary": f"{entry.vocabulary:,}"}
    cells |= {"pooling": entry.pooling}
    if entry.blocks is not None:
        cells |= {"blocks": str(entry.blocks)}
    return cells | {
        "parameters": f"{entry.parameters / 1e6:,.1f} M",
        "FLOPs": f"{entry.flops / 1e9:,.1f} G",
        "memory": f"{entry.memory_bytes / 1e6:,.0f} MB",
        "licence": licence(entry),
        "good on": ", ".join(good_on(entry)) or "untried",
        "fails on": ", ".join(fails_on(entry, failing)) or "-",
    }


def triple(values: Sequence[float] | None) -> str:
    """One number where the channels agree."""
    shown = [f"{value:.3f}".rstrip("0").rstrip(".") for value in values or ()]
    return shown[0] if len(set(shown)) == 1 else "/".join(shown)


def licence(entry: Entry) -> str:
    """As the model card states it."""
    return entry.licence or ("by weights" if entry.part == "pair" else "none stated")


def good_on(entry: Entry) -> list[str]:
    """Kinds of device on which it was trained in a test."""
    tried = {*curated_names("vision"), *curated_names("text")}
    return [GOOD_ON] if entry.name in tried else []


def fails_on(entry: Entry, failing: dict[str, dict[str, str]]) -> list[str]:
    """Kinds of device on which it is known to fail."""
    return [device for device, towers in failing.items() if entry.name in towers]


def describe(entry: Entry, failing: dict[str, dict[str, str]]) -> str:
    """Everything that is known of one model, a line each."""
    rows = [["adapter", entry.adapter], ["part", entry.part]]
    rows += [[heading, cell] for heading, cell in columns(entry, failing).items()]
    if entry.sequence_width is not None:
        rows.append(["token width", str(entry.sequence_width)])
    if entry.interpolation is not None:
        rows.append(["resizing", entry.interpolation])
    if entry.flops_tokens is not None:
        rows.append(["FLOPs of", f"a caption of {entry.flops_tokens} tokens"])
    for part, facts in entry.parts.items():
        rows.append(
            [
                f"its {part}",
                f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['flops'] / 1e9:,.1f} G "
                f"FLOPs, tokens {facts['sequence_width']} wide, pooling {facts['pooling']}",
            ]
        )
    if entry.fault is not None:
        rows.append(["cannot be trained", entry.fault])
    return aligned(rows)


def as_json(entry: Entry, failing: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The entry with its devices."""
    devices = {"good_on": good_on(entry), "fails_on": fails_on(entry, failing)}
    return {**entry.to_json(), **devices}


def presets() -> str:
    """One line a preset, its towers' true widths and what stands between them."""
    known = entries()
    rows = [["name", "image tower", "width", "text tower", "width", "shared width"]]
    for name, settings in PRESETS.items():
        vision, text = known[settings["vision"]["name"]], known[settings["text"]["name"]]
        shared = str(settings["embed_dim"])
        rows.append([name, vision.name, str(vision.width), text.name, str(text.width), shared])
    rows.append(["openclip:NAME", "its own", "", "its own", "", "its own"])
    return aligned(rows)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Cells under one another."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
