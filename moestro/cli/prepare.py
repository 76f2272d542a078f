"""moestro prepare"""

from argparse import Namespace

from moestro.cli.arguments import Parser, add_recipe


def add_arguments(parser: Parser) -> None:
    """RECIPE, key=value ..."""
    add_recipe(parser)


def run(arguments: Namespace) -> int:
    """Tokenize a recipe's text and keep the result, as its first training would.

    examples:
      moestro prepare recipes/hmoe.yaml
      moestro prepare recipes/hmoe.yaml 'data.source={kind: jsonl, paths: my/texts.jsonl}'
    """
    from moestro.recipe.build import build_data
    from moestro.recipe.load import load_recipe

    dataset = build_data(load_recipe(arguments.recipe, arguments.overrides)).prepare()
    print(
        f"{dataset.name}: {dataset.n_train_tokens:,} training tokens, {dataset.n_val_tokens:,} held out "
        f"({dataset.n_val_bytes:,} bytes), {dataset.vocab_size:,} different ones, in {dataset.folder}"
    )
    return 0
