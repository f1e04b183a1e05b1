"""Rules of the house that no linter knows."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from mmscale.config.load import PRESETS, load_config
from mmscale.config.schema import Config
from mmscale.loss.term import terms
from tools.house_figures import circle, functions, imported, lines_of, modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmscale"
TEXT_LIMIT_BYTES = 1_000_000
# Not installed everywhere, or imported by launchers before us.
FOREIGN = {"datasets", "distributed", "evaluate", "tokenizers", "wandb", "webdataset"}
# What a page tells its reader to write.
TO_BE_WRITTEN = {"mmscale/loss/cyclic.py"}
# A little above what is true today, so that a change has room and growth is noticed.
FILES, LINES, LONGEST_FILE = 310, 53_000, 400
LONG_FUNCTIONS, WIDE_FUNCTIONS = 0, 7
WAY_FILES, WAY_LINES = 17, 3_700
# Roots of folders that exist on one machine only.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}-])/(?:work|home|root|Users)/\w")
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def tracked() -> list[Path]:
    """Files that git knows or would add, as they are in the working folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and field of every setting, inside lists and unions too."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for section in _sections(field.annotation):
            yield from settings(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def test_no_module_shadows_another_when_a_file_of_the_package_is_launched():
    ours = {path.stem for path in PACKAGE.glob("*.py")}
    ours |= {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    # The package itself is installed, and so are the checkout's other folders in some layouts.
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"mmscale"}
    }
    taken = sys.stdlib_module_names | installed | FOREIGN
    assert not ours & taken


def test_every_setting_is_documented():
    paths = dict(settings(Config))
    assert "loss.terms.weight" in paths, "the walk reaches settings inside lists"
    assert not [path for path, field in paths.items() if not field.description]


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads(preset):
    config = load_config([preset.stem, "data.train=somewhere"])
    assert config.data.train == "somewhere"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_files_leave_the_rest_to_the_run(path):
    file = json.loads(path.read_text("utf-8"))
    assert set(file) <= {
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
    }
    if sys.platform == "linux":
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        known = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
        assert set(file["zero_optimization"]) <= known


def test_commands_of_the_readme_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test", "test-slow", "check", "setup"} <= targets
    pages = [path for path in tracked() if path.suffix == ".md"]
    # In code only: prose also says "make sure".
    named = {
        target
        for page in pages
        for code in re.findall(r"```.*?```|`[^`\n]+`", page.read_text("utf-8"), re.DOTALL)
        for target in re.findall(r"\bmake ([a-z-]+)", code)
    }
    assert named <= targets


def _anchors(page: Path) -> set[str]:
    """What links can name in a page: its headings as GitHub writes them into addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_to_a_file_and_a_heading():
    pages = [path for path in tracked() if path.suffix == ".md"]
    broken = []
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (heading and heading not in _anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert pages
    assert not broken


def test_source_files_named_in_pages_exist():
    named = {
        (page, name)
        for page in tracked()
        if page.suffix == ".md"
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|sbatch))`", page.read_text("utf-8"))
    }
    assert named
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page, name in named
        if not any((folder / name).exists() for folder in (ROOT, PACKAGE, page.parent))
        and name not in TO_BE_WRITTEN
    }
    assert not missing


def test_tracked_files_are_small_and_hold_no_data():
    large = {str(p): p.stat().st_size for p in tracked() if p.stat().st_size > TEXT_LIMIT_BYTES}
    assert not large
    assert not [path for path in tracked() if ".tar" in path.suffixes]


def test_tracked_files_name_no_folder_of_one_machine():
    found = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in MACHINE_PATHS.finditer(text)]
    assert not found


def test_no_file_is_named_for_nothing():
    assert not [path for path in tracked() if path.name in VAGUE_NAMES]


@pytest.mark.skipif(not (PACKAGE / "train.py").exists(), reason="no train.py")
def test_train_py_is_short_and_holds_functions_only():
    source = (PACKAGE / "train.py").read_text("utf-8")
    assert len(source.splitlines()) <= 250
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def test_train_py_is_imported_only_by_what_stands_above_it():
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "mmscale.train" in set(imports(path))
    }
    assert importers <= {"cli", "api.py"}


@pytest.mark.parametrize("library", ["deepspeed", "accelerate"])
def test_a_training_library_is_imported_only_in_its_engine(library):
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert importers <= {f"engine/{library}.py"}


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "tools" / "constraints.txt").read_text("utf-8").splitlines()
    pins = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r"#.*|[a-z0-9.-]+==\S+", line) for line in lines)
    project = importlib.metadata.requires("mmscale") or []
    wanted = {
        re.split(r"[ <>=!~;\[(]", line)[0].lower().replace("_", "-")
        for line in project
        if 'extra == "oracle"' not in line
    }
    # The extra that names all others.
    assert wanted - {"mmscale"} <= pins


def test_tested_versions_lie_in_the_ranges_of_the_project():
    lines = (ROOT / "tools" / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def test_openclips_trainer_can_be_installed_beside():
    """It asks for webdataset 0.2.5 to 0.2.86; what it asks for of torch is a lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    asked = [
        Requirement(line)
        for line in importlib.metadata.requires("open_clip_torch") or []
        if 'extra == "training"' in line and line.startswith("webdataset")
    ]
    assert asked
    for theirs in asked:
        assert any(
            theirs.specifier.contains(version) and ours["webdataset"].contains(version)
            for version in ("0.2.86", "1.0.2")
        )


def test_ranks_exchange_no_pickles():
    """torch's collectives of objects unpickle whatever reaches the address that ranks meet at."""
    called = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"\w+_object(_list)?", node.attr)
    }
    assert called == set()


def test_files_lines_functions_and_imports_of_the_package_stay_within_their_limits():
    files = modules()
    every = [function for path in files.values() for function in functions(path)]
    assert len(files) <= FILES
    assert sum(lines_of(path) for path in files.values()) <= LINES
    assert max(lines_of(path) for path in files.values()) <= LONGEST_FILE
    assert sum(function.lines > 60 for function in every) <= LONG_FUNCTIONS
    assert sum(function.parameters > 7 for function in every) <= WIDE_FUNCTIONS
    assert circle() == []


def test_the_rooms_of_the_page_are_the_layers_that_the_linter_holds():
    """Room for room, in the same order."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    drawing = page.split("## Rooms")[1].split("```")[1].strip().splitlines()
    rows = [re.findall(r"\w+(?=/|\.py)", re.split(r" {2,}", line)[0]) for line in drawing]
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = (found["layers"] for found in linter["contracts"] if found["type"] == "layers")
    assert rows == [[room.split(".")[1] for room in layer.split(" | ")] for layer in layers]


def _way_of_a_batch() -> list[tuple[str, list[str]]]:
    """Each file of the table in docs/architecture.md, and those that lead to it."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = page.split("## The way of a batch")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+\.py)` \|([^|]*)\|", table, re.MULTILINE)
    return [(file, re.findall(r"`(\S+\.py)`", way)) for file, way in rows]


def test_the_way_of_a_batch_is_as_short_as_its_table_says():
    way = [file for file, _ in _way_of_a_batch()]
    assert len(way) == len(set(way)) <= WAY_FILES
    assert sum(lines_of(PACKAGE / file) for file in way) <= WAY_LINES


def test_each_file_on_the_way_of_a_batch_is_imported_by_those_that_lead_to_it():
    known = modules()
    names = {str(path.relative_to(PACKAGE)): name for name, path in known.items()}
    files = {name: file for file, name in names.items()}
    # `loss/term.py` imports every module of its folder, which no import statement names.
    found = {"loss/term.py": {files[compute.__module__] for compute in terms().values()}}

    def leads_to(file: str) -> set[str]:
        direct = {files[name] for name in imported(known[names[file]], known)}
        through = {
            inner for name in direct if name.endswith("__init__.py") for inner in leads_to(name)
        }
        return direct | through | found.get(file, set())

    (first, none), *rest = _way_of_a_batch()
    assert (first, none) == ("train.py", [])
    seen = {first}
    for file, chain in rest:
        assert chain, f"{file}: nothing is said to lead to it"
        reached = seen
        for link in [*chain, file]:
            on_the_way = link in seen or any(link in leads_to(other) for other in reached)
            assert on_the_way, f"{file}: {link} is imported by none of {sorted(reached)}"
            reached = {link}
        seen |= {file, *chain}
