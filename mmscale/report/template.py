"""HTML files that open from disk: one look, everything inside, whatever is filled in escaped.

A page's own policy forbids any load from elsewhere, and any script or style but those of this
folder, which it names by their digests: text from a run can never become code.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmscale.outputs import replace_file
from mmscale.report.console import clean

_FOLDER = Path(__file__).parent


def _legible(value: Any) -> Any:
    """What is filled in, without characters that steer: NUL, escapes, changes of direction."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(clean(line) for line in value.split("\n"))


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_legible,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_html(path: Path, template: str, **values: Any) -> None:
    """Fill one of this folder's templates."""
    style, script = ((_FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    text = _ENVIRONMENT.get_template(template).render(
        style=Markup(style),
        style_digest=_digest(style),
        script=Markup(script),
        script_digest=_digest(script),
        **values,
    )
    replace_file(path, text.encode("utf-8", "replace"))


def _digest(code: str) -> str:
    """The name of a script or style in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
