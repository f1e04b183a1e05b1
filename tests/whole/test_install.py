"""The package as users install it: from the clone by path, and as a wheel outside of it."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_house import tracked
from tests.whole.command import ROOT, explain, run
from tests.whole.small_run import succeed

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files in a folder named as git clones it."""
    folder = tmp_path_factory.mktemp("beside") / "mmscale"
    linked = ROOT / "mmscale" / "config" / "ds_configs"
    for path in [*tracked(), linked]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy, follow_symlinks=False)
    return folder


def test_a_wheel_holds_whatever_the_package_reads(clone, tmp_path):
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, clone]
    succeed([*PIP, *build])
    (wheel,) = tmp_path.glob("*.whl")
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    wanted = {
        str(path.relative_to(ROOT)) for path in tracked() if (ROOT / "mmscale") in path.parents
    }
    wanted |= {f"mmscale/config/ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")}
    packed = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in wanted if not name.endswith(".md")} <= packed
    ask = (
        "import mmscale; print(mmscale.__file__);"
        "from mmscale.config.load import load_config;"
        "from mmscale.config.deepspeed import zero_stage;"
        "from mmscale.config.cluster import read_cluster;"
        "name = load_config(['flickr30k', 'engine.deepspeed=zero2']).engine.deepspeed;"
        "print(zero_stage(name), zero_stage('ds_configs/zero3.json'), read_cluster('a100').name)"
    )
    done = run([sys.executable, "-c", ask], cwd=tmp_path, env={"PYTHONPATH": str(folder)})
    assert done.returncode == 0, explain(done)
    where, answers = done.stdout.splitlines()
    assert where.startswith(str(folder))
    assert answers.startswith("2 3 A100")


def test_an_editable_install_is_found_beside_the_clone(clone, tmp_path):
    """There the clone's own folder, which is no package, has the package's name."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    # The environment of the tests lends it pip, the build backend and all that is depended on.
    site = next(Path(path) for path in sys.path if (Path(path) / "setuptools").is_dir())
    lent = {"PYTHONPATH": str(site)}
    install = ["install", "--no-deps", "--no-build-isolation", "--no-index", "-e", clone]
    done = run([python, "-m", "pip", *install], cwd=tmp_path, env=lent)
    assert done.returncode == 0, explain(done)
    ask = "import mmscale; print(mmscale.__file__, mmscale.load)"
    for folder in (clone.parent, clone, tmp_path):
        done = subprocess.run(
            [python, "-c", ask], cwd=folder, env={}, capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith(str(clone / "mmscale" / "__init__.py")), done.stderr
