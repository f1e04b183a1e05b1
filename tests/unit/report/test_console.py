import io
import time
from itertools import pairwise

from rich.console import Console

from mmscale.report.console import TrainingConsole, clean, duration


def watched(total_steps=10, terminal=False):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160, color_system=None)
    return TrainingConsole(total_steps, console), stream


def line(step):
    return {
        "step": step,
        "loss": 2.5,
        "loss_chance": 5.545,
        "samples_per_second": 1234.5,
        "data_wait": 0.031,
    }


def test_a_file_gets_the_first_and_the_last_line_but_not_each():
    screen, stream = watched()
    for step in range(1, 11):
        screen.training(line(step))
    first, last = stream.getvalue().splitlines()
    assert "step 1/10" in first
    assert "step 10/10" in last
    for part in ("loss 2.5000", "chance 5.545", "1,234 pairs/s", "data wait 3%", "0:00 left"):
        assert part in last


def test_a_terminal_gets_a_live_line_and_is_given_back():
    screen, stream = watched(terminal=True)
    screen.training(line(1))
    screen.evaluation({"step": 1, "eval/i2t_r1": 12.3, "eval/t2i_r1": 11.0})
    screen.training(line(2))
    screen.close()
    shown = stream.getvalue()
    assert "step 2/10" in shown
    assert "R@1 12.3/11.0" in shown
    assert shown.rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_recalls_are_told_with_their_size():
    screen, stream = watched()
    screen.evaluation(
        {"step": 5, "eval/images": 500, "eval/captions": 2500}
        | {f"eval/{way}_r{k}": float(k) for way in ("i2t", "t2i") for k in (1, 5, 10)}
    )
    assert "1.0 / 5.0 / 10.0" in stream.getvalue()
    assert "500 images, 2,500 captions" in stream.getvalue()


def test_missing_figures_do_not_stop_training():
    screen, stream = watched()
    screen.training({"step": 1, "loss": None})
    assert "loss ?  " in stream.getvalue(), "no chance value either"


def test_text_from_data_is_neither_markup_nor_control():
    screen, stream = watched()
    screen.say("a [red]dog[/red] [/] :smile: \x1b[2Jon\x07 a\nsecond\u2028line \u202egnirts")
    assert stream.getvalue() == "a [red]dog[/red] [/] :smile: [2Jon a second line gnirts\n"


def test_clean_keeps_accents_other_scripts_and_emoji():
    assert clean("café 犬 \U0001f415\ud800") == "café 犬 \U0001f415"


def test_seconds_are_shown_as_hours_minutes_and_seconds():
    assert [duration(s) for s in (0, 65, 59.6, 7200)] == ["0:00", "1:05", "1:00", "2:00:00"]


def test_the_time_left_goes_by_the_pace_of_the_stage_at_hand(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen, stream = watched(total_steps=1000)
    for step in range(1, 301):
        now += 0.01 if step <= 200 else 6.0
        screen.training(line(step))
    assert "1:10:00 left" in stream.getvalue().splitlines()[-1]


def test_a_file_gets_lines_at_growing_intervals(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen, stream = watched(total_steps=86_401)
    for step in range(1, 86_401):
        now += 1.0
        screen.training(line(step))
    steps = [
        int(said.split()[1].split("/")[0].replace(",", ""))
        for said in stream.getvalue().splitlines()
    ]
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert gaps[:10] == [5] * 10
    assert gaps == sorted(gaps)
    assert 590 <= gaps[-1] <= 601
    assert 300 < len(steps) < 400


def test_the_time_left_is_seen_on_a_narrow_terminal():
    stream = io.StringIO()
    screen = TrainingConsole(10, Console(file=stream, force_terminal=True, width=60))
    screen.training(line(10))
    screen.close()
    assert "step 10/10  0:00 left" in stream.getvalue()
