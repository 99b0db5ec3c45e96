import base64
import hashlib
import re
from importlib.resources import files

import pytest

from pipeline.report.page import duration

CSS = (files("pipeline.report") / "templates" / "page.css").read_text()
JAVASCRIPT = (files("pipeline.report") / "templates" / "page.js").read_text()


def test_a_time_reads_as_people_say_it() -> None:
    said = [duration(seconds) for seconds in (0.04, 9.94, 9.96, 59.4, 59.6, 185, 7800)]
    assert said == ["0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]


def test_styles_and_scripts_ask_for_nothing_outside() -> None:
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", CSS + JAVASCRIPT)
    assert "</script" not in JAVASCRIPT
    assert "</style" not in CSS


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_colours_have_the_contrast_that_wcag_asks_of_text(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for text in ("ink", "soft", "model", "blind", "right", "wrong"):
        for ground in ("paper", "card", "wash"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """Returns WCAG's ratio of two colours written #rrggbb."""
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def script_digest(html: str) -> tuple[str, str]:
    """Returns the digest that a page's policy names, and that of the script it carries."""
    (named,) = re.findall(r"script-src 'sha256-([^']+)'", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return named, digest
