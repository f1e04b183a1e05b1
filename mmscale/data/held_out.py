"""A part of the images kept for evaluation, of a data set that tells no splits."""

import hashlib
from dataclasses import replace

from mmscale.data.sources import Record, Source
from mmscale.errors import ConfigError, DataError


def held_out(data: Source, share: float) -> Source:
    """The same data set with `share` of its images in `val` and the others in `train`.

    Which ones follows from their keys alone, so that it is the same every time; images of one
    group stay together.

    Raises:
        ConfigError: It tells its splits itself, or the share is none.
        DataError: Nothing would be left on one side.
    """
    if not 0 < share < 1:
        raise ConfigError(f"hold_out={share:g} is not a share; give one between 0 and 1, as 0.1")
    if data.tells_splits:
        raise ConfigError(
            f"hold_out={share:g}: {data.name} says itself what is {', '.join(data.splits)}; leave "
            "--hold-out away"
        )
    names = sorted({_name(record) for record in data.records}, key=_draw)
    chosen = set(names[: round(share * len(names))])
    if not chosen or len(chosen) == len(names):
        raise DataError(
            f"hold_out={share:g} of {len(names):,} images leaves nothing on one side; give another "
            "share"
        )
    records = tuple(
        replace(record, split="val" if _name(record) in chosen else "train")
        for record in data.records
    )
    held = sum(record.split == "val" for record in records)
    # That nothing tells of splits is no news any more.
    notes = tuple(note for note in data.notes if "no split is known" not in note)
    line = f"{held:,} of {len(records):,} images are held out as val, chosen by their names"
    return replace(data, records=records, notes=(*notes, line))


def _name(record: Record) -> str:
    return f"group {record.group}" if record.group is not None else record.key


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), person=b"hold-out").digest()
