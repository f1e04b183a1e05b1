"""Where a command writes: looked at before the work, and a fault told by name and path."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmscale.errors import ConfigError, told
from mmscale.outputs import (
    file_output,
    replace_file,
    require_file,
    require_folder,
    write_output,
    writing,
)


@pytest.fixture
def afile(tmp_path) -> Path:
    path = tmp_path / "afile"
    path.write_text("x")
    return path


def _places(tmp_path: Path, afile: Path) -> dict[str, Path]:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    return {
        "a file stands where a folder": afile / "below" / "x",
        "too long": tmp_path / ("n" * 300),
        "circle": loop / "x",
        "no such": Path("/proc/nothing-is-made-here"),
    }


@pytest.mark.parametrize("require", [require_file, require_folder])
def test_places_that_nothing_can_be_written_to_are_refused(require, tmp_path, afile):
    for part, place in _places(tmp_path, afile).items():
        with pytest.raises(ConfigError, match=part) as refused:
            require("--out", place)
        assert str(refused.value).startswith(f"--out {place}: cannot be written: ")


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path, afile):
    with pytest.raises(ConfigError, match="a file stands where a folder is needed"):
        require_folder("run.dir", afile)
    with pytest.raises(ConfigError, match=f"--json {tmp_path}: .* name a file"):
        require_file("--json", tmp_path)


def test_looking_leaves_nothing_and_what_can_be_written_passes(tmp_path, afile):
    before = sorted(tmp_path.iterdir())
    require_file("--json", afile)
    require_file("--json", tmp_path / "new" / "folders" / "x.json")
    require_folder("run.dir", tmp_path / "new" / "run")
    require_folder("run.dir", tmp_path)
    require_file("--json", Path("/dev/full"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_permission_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    script = (
        "from pathlib import Path; from mmscale.outputs import require_folder;"
        f"require_folder('run.dir', Path({str(folder / 'run')!r}))"
    )
    done = subprocess.run(
        [*bound_by_permissions(), "python", "-c", script], capture_output=True, text=True
    )
    assert "ConfigError" in done.stderr, done.stderr
    assert f"run.dir={folder / 'run'}: cannot be written: this user may not" in done.stderr


def bound_by_permissions() -> list[str]:
    """What to put before a command so that permission bits bind it, also for root."""
    if os.geteuid():
        return []
    if subprocess.run(["setpriv", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("root, and no setpriv")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def test_a_file_appears_whole_with_the_folders_above_it_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b" / "x"
    write_output("--json", path, b"one")
    with pytest.raises(ConfigError, match="the disk is full"):
        _write_half(path)
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def _write_half(path: Path) -> None:
    with file_output("--json", path) as aside:
        aside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_link_keeps_pointing_at_what_is_written(tmp_path, afile):
    link = tmp_path / "link"
    link.symlink_to(afile)
    write_output("--json", link, b"new")
    assert link.is_symlink()
    assert afile.read_bytes() == b"new"


def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(ConfigError, match=r"--json /dev/full: .* the disk is full"):
        write_output("--json", Path("/dev/full"), b"figures")
    write_output("--json", Path("/dev/null"), b"figures")
    assert not Path("/dev/null").is_file()


def test_what_a_disk_has_against_a_tensor_file_is_told_too(tmp_path):
    refused = pytest.raises(ConfigError, match=r"data\.feature_cache=/cache: .* no such file")
    with refused, writing("data.feature_cache", Path("/cache")):
        save_file({"a": torch.zeros(10)}, tmp_path / "none" / "x")


def test_bugs_of_our_own_are_not_dressed_up():
    with pytest.raises(ZeroDivisionError), writing("--out", Path("x")):
        raise ZeroDivisionError
    assert told(ValueError("x")) is None
    assert told(OSError("no number")) is None


def test_a_full_disk_names_the_file(tmp_path):
    failure = told(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")))
    assert failure.exit_code == 2
    assert str(failure).startswith(f"{tmp_path / 'x'}: the disk is full")
    with pytest.raises(FileNotFoundError) as refused:
        replace_file(tmp_path / "none" / "x", b"")
    assert refused.value.filename == str(tmp_path / "none" / "x")
