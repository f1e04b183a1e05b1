"""Every flag of open_clip's trainer is told what it means here, as the page of flags has it."""

import inspect
import re
from pathlib import Path

import pytest
from open_clip_train import params

from mmscale.config.explain import known_settings, meant_by
from mmscale.config.foreign import FOREIGN_NAMES, OPEN_CLIP_FLAGS
from mmscale.config.load import load_config
from mmscale.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "from-open-clip.md"


def rows() -> dict[str, str | None]:
    """By flag, the setting that the page names beside it."""
    found = {}
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("| `--"):
            flags, setting = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            found |= dict.fromkeys(flags, setting[0] if setting else None)
    return found


def test_the_page_has_every_flag_and_real_settings():
    flags = re.findall(r'"(--[a-z0-9-]+)"', inspect.getsource(params))
    assert len(flags) > 70
    assert sorted(rows()) == sorted(flags)
    assert {setting for setting in rows().values() if setting} <= known_settings().keys()
    assert set(FOREIGN_NAMES.values()) <= known_settings().keys()


@pytest.mark.parametrize("flag", sorted(rows()))
def test_a_flag_is_refused_with_the_setting_of_the_page(flag):
    name, setting = flag.lstrip("-").replace("-", "_"), rows()[flag]
    assert (OPEN_CLIP_FLAGS[name] if name in OPEN_CLIP_FLAGS else meant_by(name)) == setting
    meant = re.escape(f", here {setting}=VALUE") if setting else ""
    with pytest.raises(ConfigError, match=f"^{flag}: no such option; .* key=value{meant}"):
        load_config(["demo", flag])
