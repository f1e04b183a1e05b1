"""What the README says holds, and the commands of every page."""

import re
import runpy
import shlex

import pytest
import typer.main

from mmscale import errors
from mmscale.cli import app
from mmscale.config.load import load_config
from mmscale.diagnostics.rules import ORDER, RULES
from mmscale.model.presets import PRESETS as MODEL_PRESETS
from tests.whole.command import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
README = PAGES[0].read_text("utf-8")
INDENTED = re.findall(r"^ {4}(make .*)$", README, re.MULTILINE)
# After these words of a command line come presets, files and key=value.
TRAINERS = (
    "mmscale/train.py",
    "slurm/train.sbatch",
    "mmscale train",
    "mmscale plan",
    "mmscale fetch",
)


def inline(page: str) -> list[str]:
    """What stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.M))


def block_lines(page: str = README) -> list[str]:
    """Lines of the shell blocks, continued lines joined, without comments."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if language in ("", "sh")]
    blocks += re.findall(
        r"^\n((?: {4}(?:mmscale|python|torchrun) .*\n(?: {6,}.*\n)*)+)", page, re.M
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def commands() -> list[str]:
    """Every command line of all pages."""
    texts = [page.read_text("utf-8") for page in PAGES]
    return sorted({line for text in texts for line in (*block_lines(text), *inline(text))})


INLINE = inline(README)
COMMANDS = commands()


def configurations() -> list[list[str]]:
    """The words that each training command of a page would hand to `load_config`."""
    found = []
    for line in COMMANDS:
        for trainer in TRAINERS:
            words = shlex.split(line.split(f"{trainer} ", 1)[1]) if f"{trainer} " in line else []
            # What a page leaves to its reader.
            if words and words[0] not in ("CONFIG", "..."):
                found.append(without_options(words))
    return found


def without_options(words: list[str]) -> list[str]:
    """Words without options and their values, which `mmscale plan` has."""
    kept, rest = list[str](), iter(words)
    for word in rest:
        if not word.startswith("--"):
            kept.append(word)
        elif word != "--formulas":
            next(rest)
    return kept


def settings_tool() -> dict:
    return runpy.run_path(str(ROOT / "tools" / "write_settings.py"))


def table(heading: str) -> list[list[str]]:
    """Cells of the table whose head starts with `heading`."""
    match = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert match, heading
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in match[1].splitlines()]


def test_the_page_of_settings_is_up_to_date():
    tool = settings_tool()
    assert tool["PAGE"].read_text("utf-8") == tool["page"](), "run python tools/write_settings.py"


def test_verbs_exist():
    verbs = set(typer.main.get_command(app).commands)
    named = {verb for line in COMMANDS for verb in re.findall(r"\bmmscale ([a-z]+)", line)}
    assert {"pack", "verify", "train", "eval", "doctor"} <= named <= verbs


def verb_lines() -> list[tuple[str, list[str]]]:
    """Verb and options of each of our commands, on any page."""
    lines = (re.search(r"\bmmscale ([a-z]+)\b(.*)", line) for line in COMMANDS)
    return [(m[1], re.findall(r"(?<!\S)(--[a-z-]+)", m[2])) for m in lines if m]


def test_options_exist_on_every_page():
    verbs = typer.main.get_command(app).commands
    wrong = [
        (verb, option)
        for verb, options in verb_lines()
        for option in options
        if verb in verbs and option not in {"--help"}.union(*(p.opts for p in verbs[verb].params))
    ]
    assert not wrong
    assert len(verb_lines()) > 60


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    lines = [*block_lines(), *INLINE, *INDENTED]
    named = {target for line in lines for target in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("words", configurations(), ids=" ".join)
def test_training_commands_load(words):
    preset = load_config(words).model.preset
    assert preset is None or preset in MODEL_PRESETS or preset.startswith(("openclip:", "hf:"))


def test_training_commands_are_found():
    presets = {words[0] for words in configurations()}
    assert {"flickr30k", "flickr8k"} <= presets


@pytest.mark.parametrize("word", [w for w in INLINE if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=\S+", w)])
def test_settings_in_the_text_load(word):
    load_config(["demo", word])


def test_the_table_of_settings_is_the_schema():
    tool = settings_tool()
    rows = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| (\S.*?) \|", tool["page"](), re.MULTILINE))
    for names, default, _ in table("setting"):
        for name in re.findall(r"`([^`]+)`", names):
            assert name in rows
            assert default in (rows[name], "the preset's"), name


def test_exit_codes_are_those_of_the_errors():
    told = {int(code) for row in table("exit code") for code in row[0].split(",")}
    ours = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MmscaleError)
    }
    assert told == ours | {0, 130}


def test_only_verdicts_that_can_be_given_are_named():
    named = {word for word in INLINE if word in ORDER}
    assert "healthy" in named
    assert named <= {*RULES, "healthy"}


def test_links_and_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    words = [word for line in block_lines() for word in shlex.split(line.replace(";", " "))]
    files = [
        word for word in words if re.match(r"(mmscale|slurm|tools)/\S+|shards/\S+\.yaml", word)
    ]
    files += [word.split("=")[1] for word in words if "=ds_configs/" in word]
    rooms = re.findall(r"`([a-z_]+(?:/|\.py))`", "\n".join(row[0] for row in table("room .*")))
    assert rooms
    files += [f"mmscale/{room}" for room in rooms]
    reading = r"`((?:data|model|loss|engine)/\w+\.py)`"
    files += [f"mmscale/{module}" for module in re.findall(reading, README)]
    missing = [name for name in {*links, *files} if not (ROOT / name).exists()]
    assert not missing
