"""Pieces of HTML: sections, tables, choices between panels."""

from collections.abc import Mapping, Sequence

from moestro.compare.plots import escape


def section(identity: str, title: str, body: str) -> str:
    """A titled part of the page that the menu can jump to."""
    return f'<section id="{identity}"><h2>{escape(title)}</h2>{body}</section>'


def paragraph(text: str, css: str = "") -> str:
    """Escaped running text."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def details(summary: str, body: str) -> str:
    """A part that opens on demand, without any script."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]], n_text: int = 1) -> str:
    """A table of escaped texts; the first `n_text` columns are words, the others numbers."""
    head = "".join(f'<th scope="col"{_kind(i, n_text)}>{escape(title)}</th>' for i, title in enumerate(titles))
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(i, n_text)}>{escape(value)}</td>" for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _kind(column: int, n_text: int) -> str:
    return "" if column < n_text else ' class="number"'


def scrolling(table: str) -> str:
    """A frame in which a wide table scrolls sideways, by touch or by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def facts(pairs: Mapping[str, str]) -> str:
    """Names and values, escaped."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="facts">{items}</dl>'


def tabs(group: str, panels: Mapping[str, str], chosen: int = 0) -> str:
    """Panels of which one is shown, chosen by radio buttons, so that no script is needed; labels are HTML."""
    if len(panels) == 1:
        return next(iter(panels.values()))
    choices, bodies = [], []
    for i, (label, body) in enumerate(panels.items()):
        checked = " checked" if i == chosen else ""
        choices.append(f'<input type="radio" class="tab-{i}" name="{group}" id="{group}-{i}"{checked}>')
        choices.append(f'<label for="{group}-{i}">{label}</label>')
        bodies.append(f'<div class="panel panel-{i}">{body}</div>')
    return f'<div class="tabs">{"".join(choices)}{"".join(bodies)}</div>'


def tab_rules(n_panels: int) -> str:
    """Style rules that show the panel of the chosen button."""
    return "".join(f".tab-{i}:checked~.panel-{i}{{display:block}}" for i in range(n_panels))
