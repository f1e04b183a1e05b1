"""Faults planted in sound sets, and clean draws: how often the data doctor is right.

python -m tools.studies.planted NAME=PACKED ... CONFIG key=value ... [--json FILE] [--masking]

Sets are folders that `mmscale pack` wrote. Pictures and captions go through the configuration's
towers once; each case is a draw of the set's rows with a fault planted, and takes seconds. With
--masking heads are trained on pairs of which a fifth is mispaired, all and without those found.
"""

import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mmscale.data.images import PackedImages
from mmscale.data.shards import ShardSet, open_shards
from mmscale.diagnostics.dataset.verdict import Looks
from mmscale.diagnostics.retrieval import RECALLS, recalls
from mmscale.evaluation.examine import Examined, examine, grey_of, look_at
from mmscale.evaluation.seen import Seen, fitting, load_seeing, see
from mmscale.parallel.peers import Alone
from tools.studies.given import Features, Model, without_data

CLEAN = 50
# Shares of a set's rows that a case draws, and of those what is held out. Mispairs are looked for
# in nearly all, other faults take fewer rows to see.
FEW, MANY = (0.3, 0.2), (1.0, 0.1)
# Rows that heads are evaluated on, how long they are trained, and how.
HELD_OUT, STEPS = (1.0, 1 / 6), 200
HEADS = (
    "model.embed_dim=256",
    "model.head.standardize=4096",
    "train.global_batch_size=256",
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
)
LEAKED, CUT = 0.03, 0.1
BATCH = 256
_LONG = " and so on and so forth" * 24


@dataclass
class Draw:
    """Rows of a set, some of them held out; a fault changes what is in it.

    Attributes:
        looks: Rows to train on.
        seen: What the towers make of them.
        held_out: Rows to evaluate on.
        wrong: Of the rows to train on, those that have another's captions.
    """

    looks: Looks
    seen: Seen
    held_out: Looks
    wrong: np.ndarray


@dataclass(frozen=True)
class Given:
    """A set, looked at once."""

    shards: ShardSet
    looks: Looks
    seen: Seen

    def draw(self, seed: int, shares: tuple[float, float] = FEW) -> Draw:
        """Rows in the set's order, some of them held out."""
        drawn, held = shares
        draws = np.random.default_rng(seed)
        row_of = {int(place): row for row, place in enumerate(self.looks.places)}
        rows = np.array([row_of[int(place)] for place in self.seen.places])
        kept = np.sort(draws.permutation(len(rows))[: round(drawn * len(rows))])
        is_held = np.isin(
            np.arange(len(kept)), draws.permutation(len(kept))[: round(held * len(kept))]
        )
        mine = kept[~is_held]
        seen = replace(
            self.seen,
            image=self.seen.image[mine],
            text=self.seen.text[mine],
            places=self.seen.places[mine],
        )
        wrong = np.zeros(len(mine), bool)
        return Draw(self.looks.take(rows[mine]), seen, self.looks.take(rows[kept[is_held]]), wrong)


Plant = Callable[[Draw, Given, int], None]


def shifted(by: int) -> Plant:
    """Every caption stands so many rows further on."""

    def plant(draw: Draw, given: Given, seed: int) -> None:
        _pair(draw, np.roll(np.arange(len(draw.looks)), by))

    return plant


def mispaired(share: float) -> Plant:
    """Images of this share exchange all their captions."""

    def plant(draw: Draw, given: Given, seed: int) -> None:
        count = len(draw.looks)
        chosen = np.random.default_rng(seed).permutation(count)[: round(share * count)]
        source = np.arange(count)
        source[chosen] = np.roll(chosen, 1)
        draw.wrong[chosen] = True
        _pair(draw, source)

    return plant


def _pair(draw: Draw, source: np.ndarray) -> None:
    draw.looks = replace(draw.looks, captions=[draw.looks.captions[row] for row in source])
    draw.seen = replace(draw.seen, text=draw.seen.text[torch.from_numpy(source)])


def leaked(change: str) -> Plant:
    """A share of the held-out pictures is replaced by changed ones of the rows to train on."""

    def plant(draw: Draw, given: Given, seed: int) -> None:
        draws = random.Random(seed)
        rows = draws.sample(range(len(draw.held_out)), round(LEAKED * len(draw.held_out)))
        greys, digests = draw.held_out.greys.copy(), list(draw.held_out.digests)
        with closing(PackedImages(given.shards).reader()) as reader:
            for row in rows:
                place = int(draw.looks.places[draws.randrange(len(draw.looks))])
                content = changed(reader.read(place).content, change, draws)
                greys[row], digests[row] = grey_of(content)[0], content[:64]
        draw.held_out = replace(draw.held_out, greys=greys, digests=digests)

    return plant


def changed(content: bytes, change: str, draws: random.Random) -> bytes:
    """An image encoded anew, mirrored, or without a tenth of either side."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    if change == "flipped":
        image = ImageOps.mirror(image)
    elif change == "cropped":
        width, height = (round(0.9 * side) for side in image.size)
        left, top = draws.randint(0, image.width - width), draws.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return file.getvalue()


def cut(draw: Draw, given: Given, seed: int) -> None:
    """A tenth of the images have captions that no tower reads to their ends."""
    chosen = set(random.Random(seed).sample(range(len(draw.looks)), round(CUT * len(draw.looks))))
    draw.looks = replace(
        draw.looks,
        captions=[
            tuple(caption + _LONG for caption in captions) if row in chosen else captions
            for row, captions in enumerate(draw.looks.captions)
        ],
    )


# What is planted, how, the verdict that is right, and how often in each set.
CASES: dict[str, tuple[Plant, str, int]] = {
    "captions shifted by 1": (shifted(1), "shifted_captions", 3),
    "captions shifted by 7": (shifted(7), "shifted_captions", 3),
    "1 % mispaired": (mispaired(0.01), "mispaired", 3),
    "5 % mispaired": (mispaired(0.05), "mispaired", 5),
    "20 % mispaired": (mispaired(0.2), "mispaired", 4),
    "3 % encoded anew": (leaked("encoded"), "leakage", 3),
    "3 % cropped by a tenth": (leaked("cropped"), "leakage", 3),
    "3 % flipped": (leaked("flipped"), "leakage", 3),
    "10 % cut captions": (cut, "cut_captions", 3),
}


def case(given: Given, name: str, seed: int) -> dict[str, Any]:
    """A planted fault, and what the doctor said."""
    plant, right, _ = CASES[name]
    draw = given.draw(seed, MANY if right == "mispaired" else FEW)
    plant(draw, given, seed)
    found = examine(draw.looks, {"": draw.held_out}, BATCH, draw.seen)
    figures = {"fault": name, "seed": seed, "verdicts": told(found)}
    is_right = told(found) == [right]
    if right == "shifted_captions" and is_right:
        is_right = found.verdicts[0].evidence["shift"] == float(re.findall(r"\d+$", name)[0])
    if right == "mispaired" and is_right:
        verdict = found.verdicts[0]
        ids = set(verdict.leave_out)
        planted = set(draw.looks.ids[draw.wrong].tolist())
        hits = len(ids & planted)
        low, high = verdict.interval
        figures |= {
            "found": hits / len(planted),
            "precision": hits / max(1, len(ids)),
            "share": verdict.share,
            "covered": low <= float(draw.wrong.mean()) <= high,
        }
    return figures | {"right": is_right}


def told(found: Examined) -> list[str]:
    """Names of the verdicts."""
    return [verdict.verdict for verdict in found.verdicts]


def cases(name: str, given: Given) -> Iterator[dict[str, Any]]:
    """Every case of a set, the clean draws last."""
    seed = 0
    for fault, (_, _, count) in CASES.items():
        for _ in range(count):
            seed += 1
            yield {"set": name} | case(given, fault, seed)
    for number in range(CLEAN):
        draw = given.draw(1000 + number)
        verdicts = told(examine(draw.looks, {"": draw.held_out}, BATCH, draw.seen))
        yield {"set": name, "fault": "none", "verdicts": verdicts, "right": not verdicts}


def masking(name: str, given: Given, seed: int) -> dict[str, Any]:
    """Mean recall on rows that are held out: of heads trained on sound pairs, on pairs of which a
    fifth is mispaired, and on those without what the doctor lists."""
    draw = given.draw(seed, HELD_OUT)
    sound = _features(draw.looks, draw.seen)
    mispaired(0.2)(draw, given, seed)
    (_, verdict) = fitting(draw.looks, draw.seen, print).verdicts
    assert verdict is not None, "a fifth is told"
    kept = ~torch.isin(torch.from_numpy(draw.looks.ids), torch.tensor(verdict.leave_out))
    planted = _features(draw.looks, draw.seen)
    rows = torch.isin(given.seen.places, torch.from_numpy(draw.held_out.places))
    ids = torch.from_numpy(draw.held_out.ids)
    held_out = Features(given.seen.image[rows], given.seen.text[rows], ids)
    trained = {"sound": sound, "planted": planted, "masked": planted.rows(kept)}
    figures = {}
    for kind, pairs in trained.items():
        model = Model(without_data([*HEADS, f"run.seed={seed}"]), pairs)
        model.train(STEPS)
        found = recalls(model.embed(held_out), Alone())
        figures[kind] = sum(found[one] for one in RECALLS) / len(RECALLS)
        model.close()
    return {"set": name, "seed": seed, "left_out": len(verdict.leave_out)} | figures


def _features(looks: Looks, seen: Seen) -> Features:
    return Features(seen.image, seen.text, torch.from_numpy(looks.ids))


def table(done: list[dict[str, Any]]) -> str:
    """What was planted, and how often the verdict was right."""
    names = list(dict.fromkeys(one["set"] for one in done))
    lines = [f"| planted | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for fault in dict.fromkeys(one["fault"] for one in done):
        cells = []
        for name in names:
            mine = [one for one in done if one["fault"] == fault and one["set"] == name]
            cell = f"{sum(one['right'] for one in mine)} of {len(mine)}"
            rows = [one for one in mine if "found" in one]
            if rows:
                cell += "; found {:.0%} at {:.0%}".format(
                    *(sum(one[key] for one in rows) / len(rows) for key in ("found", "precision"))
                )
            cells.append(cell)
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Run all cases and print their table."""
    out = Path(words.pop(words.index("--json") + 1)) if "--json" in words else None
    masks = "--masking" in words
    words = [word for word in words if word not in ("--json", "--masking")]
    named = [word for word in words if re.fullmatch(r"[a-z0-9]+=.+", word)]
    places = dict(word.split("=", 1) for word in named)
    loaded = load_seeing(None, [word for word in words if word not in named])
    done: list[dict[str, Any]] = []
    for name, place in places.items():
        shards = open_shards(name, place)
        given = Given(shards, look_at(shards), see(loaded, False, shards, 1, print))
        seeds = range(3)
        found = (masking(name, given, seed) for seed in seeds) if masks else cases(name, given)
        for one in found:
            done.append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
            if out is not None:
                out.write_text(json.dumps(done), "utf-8")
    print("" if masks else table(done))


if __name__ == "__main__":
    main(sys.argv[1:])
