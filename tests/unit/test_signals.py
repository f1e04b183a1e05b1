"""What a command does at a signal, in processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from mmscale.parallel import signals
from mmscale.parallel.signals import StopSignal, heeding_signals
from mmscale.errors import saying_how_to_go_on
signals._PATIENCE_SECONDS = 1.0

def say(word):
    print(word, flush=True)

def action():
    with saying_how_to_go_on(lambda: "the way on"):
        {action}
    return 0

sys.exit(heeding_signals(action))
"""
# A call that does not come back to Python for hours.
STUCK = """
        import hashlib, threading
        threading.Timer(0.5, say, ["begun"]).start()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)
"""
ASLEEP = "say('begun'); time.sleep(100)"
SLOW_END = """
        try:
            say('begun'); time.sleep(100)
        finally:
            say('ending'); time.sleep(100)
"""
NOTING = """
        stop = StopSignal()
        say('begun')
        while not stop.wanted:
            time.sleep(0.05)
        time.sleep(3)
        say('done')
        with stop.at_once():
            time.sleep(100)
"""


def _start(action: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(action=action)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 143, "mmscale: told to stop; the way on\n"),
        (signal.SIGUSR1, 143, "mmscale: told to stop; the way on\n"),
        (signal.SIGINT, 130, "mmscale: interrupted; the way on\n"),
    ],
)
def test_a_signal_ends_a_command_in_one_line(number, code, told):
    process = _start(ASLEEP)
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == told
    assert process.returncode == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_call_that_does_not_return_is_ended_all_the_same(number, code):
    process = _start(STUCK)
    process.send_signal(number)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == code, told
    assert told.count("\n") == 1
    assert "ended where it stood" in told


def test_a_second_ctrl_c_ends_at_once_and_one_that_came_twice_is_one():
    process = _start(SLOW_END)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    time.sleep(1.5)
    assert process.poll() is None, "the end that began is let end"
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 130, told
    assert told == "mmscale: interrupted twice, ended at once\n"


def test_a_signal_that_is_noted_disturbs_nothing_until_nothing_is_lost():
    process = _start(NOTING)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "done\n"
    assert process.communicate(timeout=30)[1] == "mmscale: told to stop; the way on\n"
    assert process.returncode == 143


def test_a_forked_process_ends_apart_from_its_parent():
    fork = """
        import os, signal
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, lambda *_: None)
            time.sleep(100)
        time.sleep(0.5)
        os.kill(child, signal.SIGINT); time.sleep(1); os.kill(child, signal.SIGINT)
        time.sleep(1)
        os.kill(child, signal.SIGTERM)
        say('begun')
        os.waitpid(child, 0)
"""
    process = _start(fork)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0
