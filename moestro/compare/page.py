"""The shell of a self-contained page: style, script, menu, and writing it in one step."""

import base64
import hashlib
import os
import string
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from moestro.compare.plots import escape
from moestro.train.durable import write_text


def html_page(verb: str, title: str, menu: Mapping[str, str], body: str, rules: str = "", legend: str = "") -> str:
    """A whole page around `body` (HTML); `menu` names its sections by id, `rules` are more style rules."""
    script = template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return string.Template(template("page.html")).substitute(
        verb=escape(verb),
        title=escape(title),
        menu=" ".join(f'<a href="#{identity}">{escape(name)}</a>' for identity, name in menu.items()),
        style=template("page.css") + rules,
        script=script,
        script_hash=f"sha256-{digest}",
        legend=legend,
        body=body,
    )


def template(name: str) -> str:
    """A file that ships beside this module."""
    return resources.files("moestro.compare").joinpath("template", name).read_text(encoding="utf-8")


def write_page(page: str, path: str | os.PathLike) -> Path:
    """Puts a page at `path` in one step: readers see the old page or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
