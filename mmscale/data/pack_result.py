"""What a pack was asked to write of a data set, and what came of it."""

from dataclasses import dataclass
from pathlib import Path

from mmscale.data.pack_folder import REJECTED_NAME
from mmscale.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Which shards of a pack this process writes: number `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `2/8`.

        Raises:
            ConfigError: It is no part.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise ConfigError(f"part={text} is not a part of a whole; write 1/8 to 8/8 for eight parts")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class PackResult:
    """One split that was packed.

    Attributes:
        split: Its name.
        folder: Where its shards and manifest are.
        shards: Tars.
        samples: Images in them.
        captions: Captions in them.
        rejected: Lines of `rejected.txt`.
        kept: Shards that an earlier run had finished.
        reasons: How many lines give each reason.
        missing: Shards that other parts have not finished; without them there is no manifest yet.
    """

    split: str
    folder: Path
    shards: int
    samples: int
    captions: int
    rejected: int
    kept: int
    reasons: tuple[tuple[str, int], ...] = ()
    missing: int = 0

    def __str__(self) -> str:
        notes = []
        if self.rejected:
            which = "".join(f", {count:,} {reason}" for reason, count in self.reasons)
            notes.append(f"{self.rejected:,} rejected{which}: see {REJECTED_NAME}")
        if self.kept:
            notes.append(f"{_counted(self.kept, 'shard')} of an earlier run kept")
        if self.missing:
            notes.append(
                f"other parts have {_counted(self.missing, 'shard')} to write; the last one writes "
                "the manifest"
            )
        remarks = f" ({'; '.join(notes)})" if notes else ""
        return (
            f"{self.split}: {_counted(self.samples, 'image')}, "
            f"{_counted(self.captions, 'caption')} in {_counted(self.shards, 'shard')} "
            f"at {self.folder}{remarks}"
        )


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
