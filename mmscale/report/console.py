"""What a person sees on stderr: a live line or a bar on a terminal, short lines elsewhere.

Texts may come from data (captions, file names): they are cleaned of control characters and never
read as markup.
"""

import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mmscale.contracts import World
from mmscale.data.progress import progress_lines
from mmscale.report.metrics import set_names

# Between two lines where stderr is a file: a share of the time until then, so that a run of a day
# writes some hundred lines, and within these bounds.
PLAIN_SHARE = 0.02
PLAIN_SECONDS = (5.0, 600.0)
PACE_UPDATES = 50
RECALLS = ("r1", "r5", "r10")
_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class TrainingConsole:
    """Shows the run's progress; one line of text for whatever else is said.

    Args:
        total_steps: Updates in the whole run.
        console: Where to write; default stderr.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total_steps = total_steps
        self._recall: tuple[float, float] | None = None
        self._pace = _Pace(total_steps)
        self._begun = time.monotonic()
        self._next_plain = self._begun
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Write one line."""
        self._print(Text(clean(text)))

    def warn(self, text: str) -> None:
        """Write one line that stands out."""
        self._print(Text.assemble(("warning: ", "bold yellow"), clean(text)))

    def training(self, line: Mapping[str, Any]) -> None:
        """Show a training line; where stderr is a file, one every few seconds and the last."""
        step = line["step"]
        self._pace.update(step)
        status = self._status(line)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._show_live(step, status)
        elif step >= self._total_steps or time.monotonic() >= self._next_plain:
            least, most = PLAIN_SECONDS
            now = time.monotonic()
            self._next_plain = now + min(max(PLAIN_SHARE * (now - self._begun), least), most)
            self.say(status)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Write what an evaluation line holds of each set."""
        if "eval/i2t_r1" in line and "eval/t2i_r1" in line:
            self._recall = line["eval/i2t_r1"], line["eval/t2i_r1"]
            self.say(f"step {line.get('step', '?')}: {_recalls(line, 'eval/')}")
        for name in set_names([line]):
            prefix = f"eval/{name}/"
            said = _accuracies if f"{prefix}top1" in line else _recalls
            self.say(f"step {line.get('step', '?')}, {name}: {said(line, prefix)}")
        if "retain/lost" in line:
            gained = _number(line.get("retain/gain"), "+.1f")
            lost = _number(line["retain/lost"], ".1f")
            self.say(f"step {line['step']}: {gained} points gained since the start, {lost} lost")

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _status(self, line: Mapping[str, Any]) -> str:
        """A training line in words, short enough for a terminal."""
        chance = f" (chance {line['loss_chance']:.3f})" if "loss_chance" in line else ""
        parts = [
            f"step {line['step']:,}/{self._total_steps:,}",
            # First, because a narrow terminal cuts the end.
            f"{self._pace.left()} left",
            f"loss {_number(line.get('loss'), '.4f')}{chance}",
        ]
        if self._recall is not None:
            parts.append("R@1 " + "/".join(_number(recall, ".1f") for recall in self._recall))
        parts += [
            f"{_number(line.get('samples_per_second'), ',.0f')} pairs/s",
            f"data wait {_number(line.get('data_wait'), '.0%')}",
            *([f"MFU {line['mfu']:.0%}"] if "mfu" in line else []),
        ]
        return "  ".join(parts)

    def _show_live(self, step: int, status: str) -> None:
        if self._progress is None:
            words = Column(no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                BarColumn(bar_width=16),
                TextColumn("{task.fields[status]}", markup=False, table_column=words),
                console=self._console,
                refresh_per_second=4,
            )
            self._progress.add_task("training", total=self._total_steps, status=status)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, status=status)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


class _Pace:
    """Time left, from the last updates: those of an earlier stage may have had another pace."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._seen: deque[tuple[float, int]] = deque(maxlen=PACE_UPDATES)

    def update(self, step: int) -> None:
        self._seen.append((time.monotonic(), step))

    def left(self) -> str:
        (begun, first), (now, last) = self._seen[0], self._seen[-1]
        missing = max(0, self._total_steps - last)
        if not missing:
            return "0:00"
        return duration(missing * (now - begun) / (last - first)) if last > first else "?"


def clean(text: str) -> str:
    """One printable line: line ends and tabs become spaces, what could steer a terminal goes."""
    kept = (
        " "
        if character in "\n\r\t" or unicodedata.category(character) in ("Zl", "Zp")
        else character
        for character in text
        if character in "\n\r\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _BIDI_CONTROLS)
    )
    return "".join(kept)


def duration(seconds: float) -> str:
    """`1:05` for 65 seconds, `2:00:00` for two hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _recalls(line: Mapping[str, Any], prefix: str) -> str:
    i2t, t2i = (
        " / ".join(_number(line.get(f"{prefix}{way}_{recall}"), ".1f") for recall in RECALLS)
        for way in ("i2t", "t2i")
    )
    over = f"{_number(line.get(f'{prefix}images'), ',')} images"
    return (
        f"R@1/5/10 image to text {i2t}, text to image {t2i} "
        f"(percent, {over}, {_number(line.get(f'{prefix}captions'), ',')} captions)"
    )


def _accuracies(line: Mapping[str, Any], prefix: str) -> str:
    """Of labelled images; few classes have no top-5."""
    figures = {name: line.get(f"{prefix}{name}") for name in ("top1", "top5", "mean_per_class")}
    said = ", ".join(
        f"{name.replace('_', ' ')} {_number(value, '.1f')}"
        for name, value in figures.items()
        if name != "top5" or value is not None
    )
    images, classes = (_number(line.get(f"{prefix}{name}"), ",") for name in ("images", "classes"))
    return f"{said} (percent, {images} images, {classes} classes)"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def early_line(world: World) -> Callable[[str], None]:
    """Says a line on the main rank before there is a run to report on."""

    def say(text: str) -> None:
        if world.is_main:
            sys.stderr.write(clean(text) + "\n")

    return say


class _RateColumn(ProgressColumn):
    """Items a second of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


@contextmanager
def progress_of(verb: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function that is called with what is done and how much there is.

    Args:
        verb: What happens to the items, such as `packed`.
        console: Where to write; default stderr.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield progress_lines(verb, lambda line: console.print(line, highlight=False, markup=False))
        return
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    # Shards end seconds apart: the rate is that of the last minutes, not of the last two.
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
