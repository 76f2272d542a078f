"""The colour, mark and dash every arm keeps throughout one report."""

from collections.abc import Mapping
from dataclasses import dataclass

from moestro.compare.plots import SHAPES, escape, marker
from moestro.compare.verdict import title_of

# Colours: template/page.css, .arm-0 to .arm-11; 0 is the neutral ink of the reference arm, 8 to 11 are dashed.
N_LOOKS = 12


@dataclass(frozen=True)
class Look:
    """How one arm is drawn: its title, its style-sheet class, the shape of its marks."""

    arm: str
    title: str
    css: str
    shape: str

    def swatch(self) -> str:
        """A small inline picture of the mark, for legends and table rows."""
        mark = marker(self.shape, 7, 7, 4.2)
        return f'<svg class="swatch {self.css}" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>'

    def name(self) -> str:
        """The swatch and the escaped title, as HTML."""
        return f'<span class="arm-name">{self.swatch()}{escape(self.title)}</span>'


def arm_looks(results: Mapping) -> dict[str, Look]:
    """A look for every arm, by its place in the list; the reference arm is always drawn in ink."""
    looks = {}
    place = 0
    for arm in results["arms"]:
        if arm == results.get("reference"):
            number = 0
        else:
            place = place % (N_LOOKS - 1) + 1
            number = place
        looks[arm] = Look(arm, title_of(results, arm), f"arm arm-{number}", SHAPES[number % len(SHAPES)])
    return looks
