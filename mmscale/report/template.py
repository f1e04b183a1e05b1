"""HTML files that open from disk: one look, everything inside, whatever is filled in escaped.

The pages' own policy forbids scripts and any load from elsewhere.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmscale.durable import replace_file

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_html(path: Path, template: str, **values: Any) -> None:
    """Fill one of this folder's templates."""
    text = _ENVIRONMENT.get_template(template).render(**values)
    replace_file(path, text.encode("utf-8", "replace"))
