"""Karpathy's JSON files: captions, splits and ids in one."""

from pathlib import Path

from mmscale.data.sources.listing import (
    Entry,
    Listing,
    label_of,
    name_of,
    number_of,
    read_json,
)
from mmscale.data.sources.records import Rejection


def read_karpathy(file: Path) -> Listing:
    """A Karpathy file; images without what is needed are faults."""
    content = read_json(file)
    listing = Listing(file, str(content.get("dataset") or file.stem.removeprefix("dataset_")), [])
    for place, image in enumerate(content["images"]):
        try:
            folder, name = image.get("filepath"), image["filename"]
            name = f"{folder}/{name}" if folder else f"{name}"
            captions = [sentence["raw"] for sentence in image["sentences"]]
            # An empty name is no split, which is told of it later.
            split = image["split"] if isinstance(image["split"], str) else ""
        except (KeyError, TypeError, AttributeError):
            reason = "no filename, split or sentences with raw text"
            listing.faults.append(Rejection(f"{file.name}: image {place}", reason))
            continue
        image_id, label = number_of(image.get("cocoid")), label_of(image.get("label"))
        group = name_of(image.get("group"))
        listing.entries.append(Entry(name, captions, split, image_id, label, group))
    return listing
