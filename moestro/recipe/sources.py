"""A recipe's sources: what is wrong with their files is said with its place in the recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from moestro.data import Document, Source
from moestro.recipe.bind import Part
from moestro.recipe.syntax import RecipeError


class PlacedSource:
    """A source that was read from a recipe.

    Raises: RecipeError with the place where its files are missing or do not hold what it reads.
    """

    def __init__(self, source: Source, part: Part) -> None:
        self.source, self.part = source, part

    @property
    def name(self) -> str:
        return self.source.name

    def fingerprint(self) -> str:
        """The source's own."""
        with self._place_named():
            return self.source.fingerprint()

    def documents(self) -> Iterator[Document]:
        """The source's own."""
        with self._place_named():
            yield from self.source.documents()

    @contextmanager
    def _place_named(self) -> Iterator[None]:
        place = self.part.place
        try:
            yield
        except RecipeError:
            raise
        except OSError as error:
            raise (place / "paths" if "paths" in self.part.keywords else place).error(str(error)) from error
        except ValueError as error:
            raise place.error(str(error)) from error
