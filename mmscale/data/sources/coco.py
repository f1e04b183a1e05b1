"""COCO's annotation files, one a split: `captions_train2017.json`."""

import re
from pathlib import Path
from typing import Any

from mmscale.data.sources.listing import IMAGE_FOLDERS, Entry, Listing, number_of, read_json
from mmscale.errors import DataError


def read_coco(file: Path) -> Listing:
    """An annotation file; what follows `captions_` in its name tells the split and the folder.

    Raises:
        DataError: It is not in this layout.
    """
    content = read_json(file)
    part = file.name.removesuffix(".gz").removesuffix(".json").removeprefix("captions")
    part = part.removeprefix("_")
    split = match[0] if (match := re.match("[a-z]+", part)) else None
    folders = (
        tuple(f"{base}{part}" for base in ("", "../", "images/", "../images/")) if part else ()
    )
    listing = Listing(file, "coco", [], image_folders=(*folders, *IMAGE_FOLDERS))
    entries: dict[Any, Entry] = {}
    try:
        for image in content["images"]:
            if image["id"] in entries:
                raise DataError(f"{file}: has two images of id {image['id']}; download it again")
            entries[image["id"]] = Entry(str(image["file_name"]), [], split, number_of(image["id"]))
        for annotation in content["annotations"]:
            entries[annotation["image_id"]].captions.append(annotation["caption"])
    except KeyError as error:
        missing = f"nothing is called {error.args[0]}"
        raise DataError(f"{file}: is not in COCO's caption layout ({missing})") from error
    except TypeError as error:
        odd = "an image or annotation is not an object"
        raise DataError(f"{file}: is not in COCO's caption layout ({odd})") from error
    listing.entries = list(entries.values())
    return listing
