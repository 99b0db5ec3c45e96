"""HTML pages of one file that ask the network for nothing."""

import base64
import hashlib
from typing import Any

import jinja2
from markupsafe import Markup

_TEMPLATES = "pipeline.report"


def render(template: str, **values: Any) -> bytes:
    """Fills a template; every value is escaped, since captions and questions are anyone's text.

    The page forbids itself, by its content security policy, any request and any script but its
    own. The same values give the same bytes.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["number"] = number
    loader = environment.loader
    assert loader is not None
    style = loader.get_source(environment, "page.css")[0]
    script = loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    html = environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_digest=digest, **values
    )
    return html.encode()


def duration(seconds: float) -> str:
    """Writes a time as people say it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """Writes a count with thousands apart: 12,345."""
    return f"{value:,}"
