import io

from rich.console import Console

from mmscale.report import console
from mmscale.report.console import progress_of


def test_a_terminal_shows_a_bar_with_rate_and_time_left():
    file = io.StringIO()
    with progress_of("packed", Console(file=file, force_terminal=True, width=100)) as tell:
        for done in (10, 20, 30):
            tell(done, 30)
    shown = file.getvalue()
    assert "packed" in shown
    assert "30/30" in shown
    assert "/s" in shown
    assert "0:00:00" in shown


def test_a_file_gets_a_line_now_and_then_and_the_last(monkeypatch):
    file, clock = io.StringIO(), iter((0.0, 1.0, 11.0, 12.0, 20.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with progress_of("packed", Console(file=file, width=100)) as tell:
        for done in (10, 110, 120, 200):
            tell(done, 200)
    assert file.getvalue().splitlines() == [
        "packed 110 of 200, 10.0/s, 9 s left",
        "packed 200 of 200, 10.0/s",
    ]
