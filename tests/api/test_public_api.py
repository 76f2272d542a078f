"""Public names and their signatures change on purpose only: the list in public_api.txt is what they were."""

import difflib
import importlib

import pytest

from tools.api_pages import pages
from tools.public_api import LIST, ROOT, document, public_names

NAMES: dict[str, set[str]] = {}
for public in public_names():
    NAMES.setdefault(public.module, set()).add(public.name)
# stand on libraries that come with extras
EXTRAS = {
    "moestro.export": "transformers",
    "moestro.export.bundle": "transformers",
    "moestro.hf": "transformers",
    "moestro.generation": "transformers",
    "moestro.harness": "lm_eval",
    "moestro.serve": "fastapi",
    "moestro.compress": "transformers",
}


def test_signatures_are_what_they_were():
    was, now = LIST.read_text(encoding="utf-8").splitlines(), document().splitlines()
    changes = "\n".join(difflib.unified_diff(was, now, "public_api.txt", "the source", lineterm="", n=1))
    assert not changes, (
        f"the public API changed:\n{changes}\n\nIf that is meant: python -m tools.public_api writes the list anew; "
        "say in CHANGELOG.md what users have to change"
    )


@pytest.mark.parametrize("module", NAMES)
def test_the_list_is_what_modules_offer(module):
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module])
    loaded = importlib.import_module(module)
    assert NAMES[module] == set(loaded.__all__)
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_every_package_with_public_names_is_there():
    assert {"moestro", "moestro.routers", "moestro.experts", "moestro.layers", "moestro.train"} <= set(NAMES)
    assert sum(map(len, NAMES.values())) > 250
    assert LIST.is_relative_to(ROOT / "tests")


def test_every_public_name_has_an_entry_with_its_signature():
    made = pages()
    for module, names in NAMES.items():
        page = made[f"api/{module}.md"]
        assert [name for name in names if f"\n## {name} {{ #{name} }}\n" not in page] == []
    assert "```python\nclass TopK(Select)\n" in made["api/moestro.routers.md"]


def test_every_public_class_and_function_says_what_it_is():
    assert [f"{each.module}.{each.name}" for each in public_names() if not each.docstring and each.lines[0][0] != "_"
            and "class " in each.lines[0]] == []  # fmt: skip
