"""Pages of the API for mkdocs, made of docstrings when the site is built: one for each module with public names."""

import ast
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from tools.public_api import CALLED, Public, class_line, members, public_names, signature

FOLDER = "api"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages (called by mkdocs)."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_config(config: Any) -> Any:
    """Puts the pages into the navigation (called by mkdocs)."""
    entry = next(item for item in config["nav"] if "Python API" in item)
    entry["Python API"] = [{_title(path): path} for path in pages()]
    return config


def pages() -> dict[str, str]:
    """{path below docs: Markdown}"""
    made = {}
    for module, publics in groupby(public_names(), lambda public: public.module):
        path = f"{FOLDER}/{module}.md"
        sections = [_reference(each) if module == "moestro" else _section(each) for each in publics]
        made[path] = "\n\n".join([f"# {module}", _module_docstring(module), *sections]) + "\n"
    return made


def _title(path: str) -> str:
    return Path(path).stem


def _module_docstring(module: str) -> str:
    root = Path(__file__).resolve().parents[1].joinpath(*module.split("."))
    file = root / "__init__.py" if root.is_dir() else root.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return prose(re.sub(r"^Floors? [\d, and-]+: (\w)", lambda found: found[1].upper(), said))


def _reference(public: Public) -> str:
    """A name that another page explains."""
    home = next(each.module for each in public_names() if each.name == public.name and each.module != "moestro")
    said = prose(public.docstring.split("\n\n")[0])
    return f"## {public.name} {{ #{public.name} }}\n\n{said}\n\n[{home}.{public.name}]({home}.md#{public.name})"


def _section(public: Public) -> str:
    node = public.node
    parts = [f"## {public.name} {{ #{public.name} }}"]
    if isinstance(node, ast.ClassDef):
        parts += [_code([class_line(node), *(f"    {line}" for line in members(node))]), prose(public.docstring)]
        parts += [_method(item) for item in node.body if isinstance(item, ast.FunctionDef) and _explained(item)]
    else:
        parts += [_code(public.lines), prose(public.docstring)]
    return "\n\n".join(part for part in parts if part)


def _explained(item: ast.FunctionDef) -> bool:
    return (item.name in CALLED or item.name[0] != "_") and ast.get_docstring(item) is not None


def _method(item: ast.FunctionDef) -> str:
    return f"**`{item.name}{signature(item)}`**\n\n{prose(ast.get_docstring(item) or '')}"


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def prose(docstring: str) -> str:
    """A docstring as Markdown: what is no code must mean nothing to Markdown or HTML."""
    pieces = re.split(r"(`[^`]*`)", docstring)
    plain = [re.sub(r"([\\<>*_\[\]])", r"\\\1", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces)]
    text = "".join(plain)
    return re.sub(r"^Raises: ", "**Raises** ", text, flags=re.MULTILINE)
