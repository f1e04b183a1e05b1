"""The page of all verbs, the version, and what a shell completes."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from mmscale.cli import command, entry
from mmscale.errors import explained

# As the console script is, under the name that completion looks for.
STARTED = "import sys; sys.argv[0] = 'mmscale'; from mmscale.cli import main; main()"


def invoked(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mmscale", *words])
    return explained(entry._invoke)


def test_every_verb_stands_in_a_group_with_its_whole_first_sentence(monkeypatch, capsys):
    assert invoked(monkeypatch, "--help") == 0
    page = " ".join(capsys.readouterr().out.split())
    listed = page[page.index(f"{command.DATA}:") :]
    for verb in command.app.registered_commands:
        assert verb.callback is not None
        name = verb.name or verb.callback.__name__
        first = (verb.callback.__doc__ or "").split("\n\n")[0]
        assert f" {name} {' '.join(first.split())}" in listed, name


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert invoked(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mmscale {importlib.metadata.version('mmscale')}\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mmscale compa", {"compare"}),
        ("mmscale train flickr30k_", {"flickr30k_frozen"}),
        ("mmscale plan demo optim.clip", {"optim.clip_norm="}),
        ("mmscale plan demo optim.betas", {"optim.betas="}),
        (
            "mmscale train optim.lr_s",
            {f"optim.lr_scale.{part}=" for part in ("vision", "text", "head", "fusion", "scale")},
        ),
    ],
)
def test_a_shell_completes_verbs_presets_and_settings(line, offered):
    asked = {
        "_MMSCALE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", STARTED],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == offered
