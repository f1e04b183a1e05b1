import os
import subprocess
import sys
import time

import pytest

from tests.whole.command import run


def test_output_and_exit_code_come_back(tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['MARK']); sys.exit(5)"
    done = run([sys.executable, "-c", program], cwd=tmp_path, env={"MARK": "x"})
    assert (done.returncode, done.stdout.split()) == (5, [str(tmp_path), "x"])


def test_grandchildren_die_with_the_command(tmp_path):
    note = tmp_path / "pid"
    program = f"sleep 600 & echo $! > {note}; echo begun; wait"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run(["bash", "-c", program], timeout=2)
    assert "begun" in caught.value.stdout
    assert _gone(int(note.read_text()))


def _gone(pid: int) -> bool:
    """A killed process leaves the table, or stays as a zombie where nobody collects it."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return True
        time.sleep(0.05)
    return False
