"""Which shards a setting names, and where they lie: folders, globs, brace lists, URLs, commands."""

import glob
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import braceexpand

from mmscale.config.data import DataConfig, KeysConfig, SourceConfig
from mmscale.data.choice import Choice
from mmscale.data.far import Far, manifest_at
from mmscale.data.intake import Intake
from mmscale.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    joined,
    parse_manifest,
)
from mmscale.data.mask import masked, read_mask, unrecorded
from mmscale.data.remote import (
    NotThereError,
    beside,
    is_address,
    is_listed,
    is_pipe,
    is_remote,
    is_web,
    piped,
    safe_url,
    split_place,
)
from mmscale.data.shard_set import (
    Origin,
    Place,
    ShardSet,
    chosen,
    require_each_once,
    require_sizes,
    told_apart,
)
from mmscale.data.sources.typed import HUB
from mmscale.errors import ConfigError, DataError

Setting: TypeAlias = "str | list[str] | list[SourceConfig]"

_MOST_SHARDS = 1_000_000
_LIST = re.compile(r"\{[^{}]*,[^{}]*\}")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
_PLAIN = Intake()


def open_train(data: DataConfig, tell: Callable[[str], None] = lambda line: None) -> ShardSet:
    """The shards that a run trains on; `tell` takes a line on what is left out of them."""
    words = ("data.train", data.train, data.allow_pipe, Intake.of(data))
    found = list_shards(*words) if data.resampled else open_shards(*words)
    if data.keys != KeysConfig():
        found = chosen(found, Choice(data.keys))
    if data.mask is None:
        return found
    mask = read_mask(data.mask)
    if data.resampled:
        # Only manifests tell whose the images are that are read without them.
        return unrecorded(found, masked(open_shards(*words), mask, tell))
    return masked(found, mask, tell)


def open_shards(
    setting: str, where: Setting, allow_pipe: bool = False, intake: Intake = _PLAIN
) -> ShardSet:
    """Find shards and their manifests, which lie beside them.

    Args:
        setting: Name of the setting, for messages.
        where: Its value: a packed folder, or globs and brace lists of tars; URLs of either; or
            commands that write a tar. Or sources with weights.
        allow_pipe: Whether commands may be run.
        intake: How tables and folders of images are packed, which are taken too.

    Raises:
        ConfigError: A command that may not be run.
        DataError: No shard matches, or there is no manifest.
    """
    finder = _Finder(setting, allow_pipe, intake)
    picked: list[tuple[Place, Shard, Origin]] = []
    sources = []
    for patterns, weight in _sources(where):
        found = [pair for pattern in patterns for pair in finder.indexed(pattern)]
        sources.append((len(found), weight))
        picked += found
    require_sizes([(path, shard) for path, shard, _ in picked if isinstance(path, Path)])
    paths, shards, origins = zip(*picked, strict=True)
    require_each_once(setting, paths)
    names = ",".join(shard.sha256 for shard in shards)
    count = sum(len(patterns) for patterns, _ in _sources(where))
    manifests = tuple(origin.digest for origin in origins)
    choices = tuple(origin.choice for origin in origins)
    if all(choice.is_usual for choice in choices):
        choices = ()
    digest = ":".join([f"{count}:{names}", *(choice.keys.words for choice in choices)])
    opened = ShardSet(shards, paths, digest, tuple(sources), manifests=manifests, choices=choices)
    return opened if len(set(origins)) == 1 else told_apart(opened, origins)


def open_stored(
    where: str | list[str], data: DataConfig | None = None, setting: str = "data.eval"
) -> ShardSet:
    """The pairs that a run's folder names; arguments and errors as `open_shards`.

    Only files: whoever wrote the folder may have named addresses that its reader would not open.
    """
    for place in [where] if isinstance(where, str) else where:
        if is_remote(place) or place.startswith(HUB):
            raise DataError(
                f"{setting}={safe_url(place)}: is an address that the run's folder names, and none "
                "is opened that you have not named yourself; name the pairs with --data"
            )
    # Where it would keep what it packs is its own word, too.
    intake = Intake.of(data.model_copy(update={"cache": None}), setting) if data else _PLAIN
    return open_shards(setting, where, intake=intake)


def open_held_out(option: str, named: str | None, stored: DataConfig) -> ShardSet | None:
    """The pairs that a user names, or else the `data.eval` of a run's folder; None without either.

    Errors as of `open_shards` and `open_stored`.
    """
    if named is not None:
        return open_shards(option, named)
    return None if stored.eval is None else open_stored(stored.eval, stored)


def list_shards(
    setting: str, where: Setting, allow_pipe: bool = False, intake: Intake | None = None
) -> ShardSet:
    """Find shards that are read without a manifest; arguments and errors as `open_shards`."""
    finder = _Finder(setting, allow_pipe, intake)
    paths: list[Place] = []
    sources = []
    for patterns, weight in _sources(where):
        found = [path for pattern in patterns for path in finder.named(pattern)]
        sources.append((len(found), weight))
        paths += found
    require_each_once(setting, paths)
    return ShardSet((), tuple(paths), "", tuple(sources))


def _sources(where: Setting) -> list[tuple[list[str], float]]:
    """Patterns and weight of each source."""
    if isinstance(where, str):
        return [([where], 1.0)]
    texts = [entry for entry in where if isinstance(entry, str)]
    if texts:
        return [(texts, 1.0)]
    return [
        ([entry.shards] if isinstance(entry.shards, str) else entry.shards, entry.weight)
        for entry in where
        if isinstance(entry, SourceConfig)
    ]


def _is_folder(pattern: str) -> bool:
    try:
        return Path(pattern).is_dir()
    except OSError:
        # A brace list may be longer than any path.
        return False


@dataclass
class _Finder:
    """What patterns of one setting match; reads each manifest once."""

    setting: str
    allow_pipe: bool
    intake: Intake | None
    _far: Far = field(default_factory=Far)
    _manifests: dict[str, dict[str, Shard]] = field(default_factory=dict)
    _origins: dict[str, Origin] = field(default_factory=dict)
    _shards_in: dict[str, Path] = field(default_factory=dict)

    def indexed(self, pattern: str) -> list[tuple[Place, Shard, Origin]]:
        """Shards of a pattern with their manifest's records, and which manifest that is."""
        if self.intake is not None:
            pattern = self.intake.folder(self.setting, pattern)
        folder = self._folder(pattern)
        if folder is not None:
            manifest = self._manifest(folder)
            origin = self._origins[str(folder)]
            place = self._shards_in.get(str(folder), folder)
            return [(beside(place, name), shard, origin) for name, shard in manifest.items()]
        found = []
        for path in self._tars(pattern):
            folder, name = split_place(path)
            shard = self._manifest(folder).get(name)
            if shard is None:
                raise DataError(
                    f"{safe_url(path)}: not in {safe_url(beside(folder, MANIFEST_NAME))}; run "
                    "mmscale index on the shards"
                )
            found.append((path, shard, self._origins[str(folder)]))
        return found

    def named(self, pattern: str) -> list[Place]:
        """Shards of a pattern, whatever they hold."""
        if self.intake is not None:
            pattern = self.intake.folder(self.setting, pattern)
        folder = self._folder(pattern)
        if isinstance(folder, Path):
            beside = glob.escape(str(folder)) + "/*.tar"
            if _on_disk(beside) or not (folder / MANIFEST_NAME).is_file():
                return self._tars(beside)
        elif folder is not None and is_listed(folder):
            return list(self._far_tars(f"{folder.rstrip('/')}/*.tar"))
        if folder is not None:
            return [path for path, _, _ in self.indexed(pattern)]
        return self._tars(pattern)

    def _folder(self, pattern: str) -> Place | None:
        """The packed folder that a pattern is; None where it names tars."""
        if is_address(pattern):
            path = urlsplit(pattern).path if is_web(pattern) else pattern
            is_tar = path.endswith((".tar", "}")) or (is_listed(path) and glob.has_magic(path))
            return None if is_tar else pattern
        return Path(pattern) if not is_pipe(pattern) and _is_folder(pattern) else None

    def _tars(self, pattern: str) -> list[Place]:
        if is_pipe(pattern) and not self.allow_pipe:
            raise ConfigError(
                f"{self.setting}={pattern}: runs a command, which is not allowed; set "
                "data.allow_pipe=true if you trust it"
            )
        parts = self._expand(pattern)
        if is_remote(pattern):
            return [path for part in parts for path in self._far_tars(part)]
        found = sorted({path for part in parts for path in _on_disk(part)})
        if not found:
            raise DataError(
                f"{self.setting}={pattern}: no shard matches; name a folder that mmscale pack "
                "wrote, or tars such as 'shards/train-{000000..000028}.tar'"
            )
        if missing := next((p for p in parts if not glob.has_magic(p) and not _on_disk(p)), None):
            raise DataError(
                f"{self.setting}={pattern}: there is no {missing}; restore the shard or leave it "
                "out of the list"
            )
        return list(found)

    def _far_tars(self, part: str) -> list[str]:
        """The tars that one address names, or the one that a command writes."""
        name = part.rpartition("/")[2]
        if is_web(part) and "*" in urlsplit(part).path:
            self._far.entries(part)
        if not is_listed(part) or not glob.has_magic(part):
            return [part]
        if glob.has_magic(part.removesuffix(name)):
            raise DataError(
                f"{self.setting}={safe_url(part)}: only a file's name may hold * or ?; name each "
                "folder"
            )
        if found := self._far.matching(part):
            return found
        raise DataError(
            f"{self.setting}={safe_url(part)}: no shard matches; name a folder with a manifest, or "
            "tars that are there"
        )

    def _expand(self, pattern: str) -> list[str]:
        count = 1
        for low, high in _RANGE.findall(pattern):
            count *= abs(int(high) - int(low)) + 1
        for names in _LIST.findall(pattern):
            count *= names.count(",") + 1
        try:
            parts = [] if count > _MOST_SHARDS else braceexpand.braceexpand(pattern)
            expanded = list(islice(parts, _MOST_SHARDS + 1))
        except ValueError as error:
            raise DataError(
                f"{self.setting}={pattern}: its braces do not match; write for example "
                "'shards/train-{000000..000028}.tar'"
            ) from error
        if not 0 < len(expanded) <= _MOST_SHARDS:
            raise DataError(
                f"{self.setting}={pattern}: names more than {_MOST_SHARDS:,} shards; narrow its "
                "braces, or name the folder"
            )
        return expanded

    def _manifest(self, folder: Place) -> dict[str, Shard]:
        if str(folder) not in self._manifests:
            manifest = self._read_manifest(folder)
            self._manifests[str(folder)] = {shard.name: shard for shard in manifest.shards}
            self._origins[str(folder)] = Origin(
                manifest.digest, manifest.classes, Choice(manifest.keys)
            )
            if manifest.shards_in is not None:
                self._shards_in[str(folder)] = self._elsewhere(folder, manifest)
        return self._manifests[str(folder)]

    def _elsewhere(self, folder: Place, manifest: Manifest) -> Path:
        """The folder that a manifest names for its tars: one of this machine, by its path."""
        place = manifest.beside(folder)
        assert isinstance(place, Path), "no other is named"
        if not place.is_dir():
            raise DataError(
                f"{beside(folder, MANIFEST_NAME)}: its shards lie in {place}, which is no folder "
                "here; mount it, or run mmscale index with --out on the shards where they are now"
            )
        return place

    def _read_manifest(self, folder: Place) -> Manifest:
        try:
            if not is_pipe(folder):
                return manifest_at(folder, self._far, lazily=True)
            where = str(beside(folder, MANIFEST_NAME))
            with closing(piped(where)) as chunks:
                content = joined(where, chunks)
        except DataError as error:
            if not (is_pipe(folder) or isinstance(error, NotThereError)):
                raise
            raise DataError(
                f"{self.setting}: the shards have no manifest ({error}); write it with mmscale "
                f"index and put {MANIFEST_NAME} beside them, or set data.resampled=true"
            ) from error
        return parse_manifest(where, content, lazily=True)


def scopes_of(paths: Sequence[Place]) -> list[tuple[int, str]]:
    """For shards without a manifest: which source each is of, by its folder, and its name there."""
    numbers: dict[str, int] = {}
    found = []
    for path in paths:
        try:
            folder, name = split_place(path)
        except DataError:
            # A command that names no tar is a source of its own.
            folder, name = path, ""
        found.append((numbers.setdefault(str(folder), len(numbers)), name))
    return found


def _on_disk(pattern: str) -> list[Path]:
    return [Path(path) for path in glob.glob(pattern)]  # noqa: PTH207
