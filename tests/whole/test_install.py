"""The package as users install it: from the clone by path, and as a wheel outside of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_house import tracked
from tests.whole.command import ROOT, explain, run
from tests.whole.small_run import succeed, write_settings

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files in a folder named as git clones it."""
    folder = tmp_path_factory.mktemp("beside") / "mmscale"
    linked = [ROOT / "mmscale" / "config" / "ds_configs", ROOT / "mmscale" / "slurm"]
    for path in [*tracked(), *linked]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    """Built from the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, clone]
    succeed([*PIP, *build])
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_whatever_the_package_reads(wheel, tmp_path):
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    wanted = {
        str(path.relative_to(ROOT)) for path in tracked() if (ROOT / "mmscale") in path.parents
    }
    wanted |= {f"mmscale/config/ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")}
    wanted |= {f"mmscale/data/recipes/{p.name}" for p in (ROOT / "shards").glob("*.yaml")}
    wanted |= {f"mmscale/slurm/{p.name}" for p in (ROOT / "slurm").iterdir()}
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


@pytest.fixture
def installed(wheel, tmp_path) -> Path:
    """The programs of an environment that holds the wheel, and borrows what it depends on."""
    venv.create(tmp_path / "env", with_pip=False)
    scripts = tmp_path / "env" / "bin"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    # A folder in a .pth is put on the path and its own .pth files are not read: no editable
    # install of the checkout comes with it.
    lent = next(Path(path) for path in sys.path if (Path(path) / "torch").is_dir())
    (site / "lent.pth").write_text(f"{lent}\n", "utf-8")
    install = ["--python", scripts / "python", "install", "--no-deps", "--no-index", wheel]
    succeed([*PIP, *install])
    return scripts


@pytest.mark.slow
def test_a_wheel_goes_the_whole_way_outside_the_checkout(installed, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    own = {"PYTHONPATH": "", "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}

    def mmscale(*words: str) -> str:
        return succeed([installed / "mmscale", *words], cwd=work, env=own).stdout

    where = "import mmscale; print(mmscale.__file__)"
    done = run([installed / "python", "-c", where], cwd=work, env=own)
    assert done.stdout.startswith(str(tmp_path / "env"))
    mmscale("synth", "--out", "shards/originals/flickr30k", "--images", "160", "--size", "48")
    # By the recipe's name, which looks for the data below shards/ of the working folder.
    said = mmscale("pack", "flickr30k", "--out", "packed")
    assert "train" in said
    small = write_settings(work)
    words = [str(small), "data.train=packed/train", "data.eval=packed/val", "data.workers=1"]
    words += ["train.duration=4 steps", "checkpoint.every=2 steps", "log.page=true"]
    planned = mmscale("plan", *words, "engine.deepspeed=zero2", "--world", "2")
    assert "ZeRO-2" in planned
    mmscale("train", *words, "run.dir=run", "engine.device=cpu")
    mmscale("eval", "run", "--data", "packed/test", "--json", "eval.json")
    assert json.loads((work / "eval.json").read_text("utf-8"))["images"] > 0
    mmscale("export", "run", "--to", "onnx", "--out", "exported")
    assert (work / "run" / "report.html").is_file()
    assert list((work / "exported").iterdir())


@pytest.mark.slow
def test_scripts_for_slurm_of_an_installed_wheel_find_their_package(installed, tmp_path):
    """As a job: a copy of the script in the spool, submitted from a folder that is no checkout."""
    own = {"PYTHONPATH": "", "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}
    listed = succeed([installed / "mmscale", "sbatch"], cwd=tmp_path, env=own).stdout.split()
    assert {Path(name).name for name in listed} == {p.name for p in (ROOT / "slurm").iterdir()}
    script = succeed([installed / "mmscale", "sbatch", "train"], cwd=tmp_path, env=own).stdout
    spooled = shutil.copy(script.strip(), tmp_path / "slurm_script")
    srun = installed / "srun"
    srun.write_text('#!/bin/sh\nfor last; do echo "$last"; done >"$WORDS"\n', "utf-8")
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1"}
    words = {"WORDS": str(tmp_path / "words")}
    succeed(["bash", spooled, "demo"], cwd=tmp_path, env={**own, **job, **words})
    *_, program, preset = (tmp_path / "words").read_text("utf-8").splitlines()
    assert (Path(program).parent / "__init__.py").samefile(
        next((tmp_path / "env").glob("lib/python*/site-packages/mmscale/__init__.py"))
    )
    assert preset == "demo"


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile"])
def test_an_install_line_names_extras_that_exist(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r'"\.\[([a-z,-]+)\]"', (ROOT / name).read_text("utf-8"))
    assert named
    for extras in named:
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_what_the_dockerfile_copies_is_in_the_checkout_and_not_ignored():
    sources = [
        source
        for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines()
        if line.startswith("COPY")
        for source in line.split()[1:-1]
    ]
    kept = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert sources
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert {f"!{source}", f"!{source}constraints.txt"} & set(kept), source


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
    ask = "import mmscale; print(mmscale.__file__, mmscale.__version__)"
    for folder in (clone.parent, clone, tmp_path):
        done = subprocess.run(
            [python, "-c", ask], cwd=folder, env={}, capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith(str(clone / "mmscale" / "__init__.py")), done.stderr
