"""Training on several ranks that would not fit into their memory, refused before anything is read or written."""

import math
import os
from dataclasses import replace

from moestro.parallel import Ranks
from moestro.plan.machines import MACHINES
from moestro.plan.search import SKEW, as_recipe_says
from moestro.plan.spread import Spread
from moestro.plan.workload import workload
from moestro.recipe.build import build_training
from moestro.recipe.load import Recipe
from moestro.recipe.memory import told
from moestro.recipe.resolve import Place
from moestro.train.hardware import free_memory


def require_ranks_fit(recipe: Recipe, vocab_size: int, ranks: Ranks) -> None:
    """Refuse what needs more on the fullest rank than a rank has free, by the formulas of `moestro plan`; ranks of one
    host share its memory where they compute on the processor. Every rank must call it, and all refuse where one does.

    Raises: RecipeError with the estimate, what there is, and what to change.
    """
    if not build_training(recipe)[0].check_memory:
        return
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.device.type == "cpu" else 1
    own = free_memory(ranks.device)
    # one number for all, so that all decide alike
    free = ranks.least(math.inf if own is None else own / shared)
    spread = planned(recipe, vocab_size, ranks)
    # what cannot be spread so is refused where it is
    if spread is not None and spread.total > free:
        where = f"{ranks.device.type} (the fullest of {ranks.world} ranks)"
        raise Place(recipe.origin, ("train",)).error(told(spread.memory, free, where, "a rank"))


def planned(recipe: Recipe, vocab_size: int, ranks: Ranks) -> Spread | None:
    """The recipe's own settings on so many ranks; None where they are impossible."""
    name = "CPU" if ranks.device.type == "cpu" else "GPU"
    asked = as_recipe_says(workload(recipe, vocab_size), replace(MACHINES["h200"], name=name), ranks.world, SKEW, None)
    return None if isinstance(asked, str) else asked
