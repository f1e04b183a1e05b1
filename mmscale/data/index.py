"""Manifests of tars that are there already: what each holds, and what in it nobody can use."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from mmscale.data.choice import USUAL, Choice
from mmscale.data.damage import MOST_LEFT_OUT, DamagedShardError, are_too_many
from mmscale.data.far import at_hand, manifest_at, put_manifest
from mmscale.data.grouping import Trait, copies_line, group_of, joints_of, tell_apart
from mmscale.data.manifest import Manifest, Shard, with_identities
from mmscale.data.members import Sample, describe_members, unfit
from mmscale.data.pool import map_ordered
from mmscale.data.remote import safe_url, split_place
from mmscale.data.tar import TarSample, walk_shard
from mmscale.errors import DataError

# Lines of one kind that are told; of more only their number.
_TOLD = 5
_TWICE = "its key occurs twice"
_NEIGHBOURS = "members of a sample must be neighbours: pack the tar again with tar --sort=name"


@dataclass(frozen=True)
class IndexSettings:
    """What counts as a sample, and what is too little.

    Attributes:
        most_left_out: Share of the samples that may be left out.
        choice: Which members of a sample are what.
    """

    most_left_out: float = MOST_LEFT_OUT
    choice: Choice = USUAL


@dataclass(frozen=True)
class Described:
    """What a tar was found to hold.

    Attributes:
        shard: The manifest's record of it, without identities.
        traits: What its samples are called and joined by.
        faults: A line for each sample that cannot be used and is left out.
        texts: How its texts of several lines were read; empty without any.
    """

    shard: Shard
    traits: tuple[Trait, ...]
    faults: tuple[str, ...]
    texts: str = ""


def index(
    shards: Iterable[Path | str],
    workers: int = 1,
    skipped: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    tell: Callable[[str], None] | None = None,
    out: Path | None = None,
    settings: IndexSettings | None = None,
) -> Manifest:
    """Write the manifest of shards made elsewhere into their folder.

    Of shards behind addresses, too: one that takes no manifest has it kept on this machine.

    Args:
        shards: Tars, all in one folder.
        workers: Processes that read them.
        skipped: Called with a line for each sample that cannot be used and is left out; of many
            alike with a few, and their number.
        progress: Called with shards done and shards in all.
        tell: Called with a line for what else should be known.
        out: Folder of the manifest, where the shards' own cannot be written.
        settings: What counts as a sample, and what is too little.

    Raises:
        OSError: The manifest cannot be written.
        DataError: No shards, shards in several folders, damaged ones, none with a sample, or too
            many samples that cannot be used.
    """
    paths = sorted(set(shards), key=str)
    if not paths:
        raise DataError("no shard matches; name the tars, such as shards/*.tar")
    folder = split_place(paths[0])[0]
    if other := next((path for path in paths if split_place(path)[0] != folder), None):
        raise DataError(
            f"{safe_url(other)}: is not in {safe_url(folder)}; index the tars of one folder at a "
            "time"
        )
    target = folder if out is None else Path(out)
    found, damaged = [], []
    settings = settings or IndexSettings()
    describe = partial(_describe, choice=settings.choice)
    for done, described in enumerate(map_ordered(describe, paths, workers), start=1):
        if isinstance(described, str):
            damaged.append(described)
        else:
            found.append(described)
        if progress:
            progress(done, len(paths))
    if damaged:
        more = f" ({len(damaged) - 1} more shards like it)" if len(damaged) > 1 else ""
        raise DataError(f"{damaged[0]}{more}")
    manifest, lines = _manifest_of(folder, target, found, settings, skipped)
    say = tell or (lambda line: None)
    for line in lines:
        say(line)
    if told := put_manifest(target, manifest):
        say(told)
    return manifest


def _manifest_of(
    folder: Path | str,
    target: Path | str,
    found: Sequence[Described],
    settings: IndexSettings,
    skipped: Callable[[str], None] | None,
) -> tuple[Manifest, list[str]]:
    """What described shards are together, and lines on how that was settled."""
    names = [described.shard.name for described in found]
    settled = tell_apart(names, [described.traits for described in found])
    own = [_without(*pair) for pair in zip(found, settled.repeats, strict=True)]
    faults = [fault for described in own for fault in described.faults]
    if skipped:
        for line in _few_of_each(faults):
            skipped(line)
    _require_most(safe_url(folder), own, faults, settings.most_left_out)
    records = [described.shard for described in own]
    traits = [
        [trait for place, trait in enumerate(part) if place not in left_out]
        for part, left_out in zip(settled.traits, settled.repeats, strict=True)
    ]
    is_here, place = isinstance(folder, Path), safe_url(folder)
    known = _as_it_was(target, records) or Manifest(None, Path(place).resolve().name, ())
    identified, classes = with_identities(records, traits)
    # Nothing that is written leads to an address: that is for its reader to name.
    is_apart = is_here and Path(target).resolve() != Path(folder).resolve()
    apart = str(Path(folder).resolve()) if is_apart else None
    manifest = replace(
        known,
        shards=identified,
        classes=classes or known.classes,
        shards_in=apart,
        keys=settings.choice.keys,
    )
    lines = _counted_texts(own)
    if any(fault.endswith(_TWICE) for fault in faults):
        lines.append(f"{place}: {_NEIGHBOURS}")
    if settled.renamed:
        lines.append(
            f"{settled.renamed:,} samples bear the key or id of another image in another shard; "
            "each counts as an image of its own, named by its shard too"
        )
    if copies := copies_line(place, manifest.copies, manifest.samples):
        lines.append(copies)
    return manifest, lines


def _require_most(
    folder: str, found: Sequence[Described], faults: Sequence[str], most: float
) -> None:
    """Refuse a folder of which too little can be used, with the fault that says why."""
    samples = sum(described.shard.samples for described in found)
    # Members that lie apart make samples without image or caption out of themselves.
    apart = [f"{fault}; {_NEIGHBOURS}" for fault in faults if fault.endswith(_TWICE)]
    first = f": {(apart or faults)[0]}" if faults else ""
    if not samples:
        raise DataError(f"{folder}: no shard holds a sample with an image and a caption{first}")
    if are_too_many(len(faults), samples + len(faults), most):
        raise DataError(
            f"{folder}: {len(faults):,} of {samples + len(faults):,} samples cannot be used, more "
            f"than --max-left-out {most:g} allows{first}"
        )


def _few_of_each(faults: Sequence[str]) -> list[str]:
    """A few lines of each kind of fault, and how many more there are."""
    counts: dict[str, int] = {}
    lines = []
    for fault in faults:
        _, _, reason = fault.partition(": sample ")
        # What differs from one sample to the next: its key, numbers, names in quotes.
        kind = re.sub(r"\d+|`[^`]*`", "", reason.partition(" ")[2])
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= _TOLD:
            lines.append(fault)
        elif counts[kind] == _TOLD + 1:
            lines.append(kind)
    return [
        f"{counts[line] - _TOLD:,} more samples like it: {line.strip()}" if line in counts else line
        for line in lines
    ]


def _counted_texts(found: Sequence[Described]) -> list[str]:
    """How texts of several lines were read, a line for each way."""
    places: dict[str, list[str]] = {}
    for described in found:
        if described.texts:
            places.setdefault(described.texts, []).append(described.shard.name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}: {how}"
        for how, names in places.items()
    ]


def _as_it_was(folder: Path | str, shards: list[Shard]) -> Manifest | None:
    """The manifest that the folder has, if it is of these very shards."""
    try:
        manifest = manifest_at(folder)
    except DataError:
        return None
    same = [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in shards]
    return manifest if same else None


def _describe(path: Path | str, choice: Choice) -> Described | str:
    """As `describe_shard`; what is wrong with a damaged one, so that all of them are named."""
    try:
        return describe_shard(path, choice)
    except DataError as error:
        return str(error)


@dataclass
class _Candidate:
    """A sample in which nothing is wrong yet but what its captions may be.

    Attributes:
        offset: Of its first header.
        whole: What it is when its text is one caption.
        by_line: What it is when each line of its text is one; None where it has one line.
    """

    key: str
    offset: int
    has_text: bool
    whole: Trait | str
    captions: int
    by_line: Trait | str | None = None
    lines: int = 0


def describe_shard(path: Path | str, choice: Choice = USUAL) -> Described:
    """Look at every sample of a tar, a file or an address, short of decoding its image.

    Raises:
        DataError: It is not a whole, uncompressed tar, or cannot be fetched.
    """
    where = safe_url(path)
    candidates: list[_Candidate | str] = []
    seen: set[str] = set()
    try:
        with at_hand(path) as file:
            for sample in walk_shard(file, choice.wanted):
                fault = _TWICE if sample.key in seen else unfit(sample, choice)
                seen.add(sample.key)
                known = f"sample {sample.key} {fault}" if fault else _candidate(sample, choice)
                candidates.append(known)
            size, digest = digest_of(file)
    except (OSError, DamagedShardError) as error:
        repair = getattr(error, "repair", "fetch or pack the shard again")
        raise DataError(f"{where}: {error}; {repair}") from error
    texts = [one for one in candidates if isinstance(one, _Candidate) and one.has_text]
    several = sum(one.by_line is not None for one in texts)
    by_line = bool(several) and several == len(texts)
    offsets, captions, traits, faults = [], [], [], []
    for one in candidates:
        if isinstance(one, str):
            faults.append(f"{where}: {one}")
            continue
        lined = one.by_line if by_line and one.by_line is not None else None
        chosen = one.whole if lined is None else lined
        if isinstance(chosen, str):
            faults.append(f"{where}: sample {one.key} {chosen}")
            continue
        offsets.append(one.offset)
        captions.append(one.captions if lined is None else one.lines)
        traits.append(chosen)
    name, counts = split_place(path)[1], (tuple(offsets), tuple(captions))
    shard = Shard(name, size, digest, len(traits), *counts, skipped=len(faults))
    return Described(shard, tuple(traits), tuple(faults), _texts_line(by_line, several))


def _texts_line(by_line: bool, several: int) -> str:
    if by_line:
        return "every txt has several lines; each line was taken as a caption"
    if several:
        return (
            "some txt have several lines and some have one; each was taken as one caption: write a "
            "JSON list into txt where lines are captions"
        )
    return ""


def _candidate(found: TarSample, choice: Choice) -> _Candidate:
    whole = describe_members(found, choice=choice)
    candidate = _Candidate(
        found.key,
        found.offset,
        whole.lines > 0,
        whole.fault or trait_of(whole),
        len(whole.captions),
    )
    if whole.lines > 1:
        lined = describe_members(found, whole.lines, choice)
        candidate.by_line, candidate.lines = lined.fault or trait_of(lined), whole.lines
    return candidate


def _without(described: Described, repeats: dict[int, str]) -> Described:
    """Without the samples that a shard before has, captions and all."""
    if not repeats:
        return described
    shard, traits = described.shard, described.traits
    kept = [place not in repeats for place in range(len(traits))]
    faults = [
        f"{shard.name}: sample {traits[place].key} its key is in {owner} too, with the same "
        "image and captions"
        for place, owner in repeats.items()
    ]
    return replace(
        described,
        shard=replace(shard.only(kept), skipped=shard.skipped + len(repeats)),
        traits=tuple(compress(traits, kept)),
        faults=(*described.faults, *faults),
    )


def trait_of(sample: Sample) -> Trait:
    """What a sample without faults is called and joined by."""
    group = None if sample.group is None else group_of(sample.group)
    joints = joints_of(sample.image, sample.captions)
    return Trait(sample.image_id, joints, group, sample.label, sample.key, sample.source)


def digest_of(file: Any) -> tuple[int, str]:
    """Size and sha256 of an open file."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return file.tell(), digest
