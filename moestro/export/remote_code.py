"""The code that travels with a model, so that it loads where this package is not installed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moestro import __version__
from moestro.export.bundle import Replacement, Symbol, bundled
from moestro.export.configuration import MoestroConfig, sizes
from moestro.export.library import Imported
from moestro.export.modeling import MoestroForCausalLM, MoestroModel
from moestro.export.vocabulary import vocabulary

CONFIGURATION, MODELING = "configuration_moestro", "modeling_moestro"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.{MoestroConfig.__name__}",
    "AutoModel": f"{MODELING}.{MoestroModel.__name__}",
    "AutoModelForCausalLM": f"{MODELING}.{MoestroForCausalLM.__name__}",
}
HEAD = '''"""{what}

Taken from the source of moestro {version} by `moestro export`: the parts that this model is made of, each operation by
its definition in plain torch. With the package installed its own code is used instead, which is faster.

Copyright the authors of moestro. Licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0), without warranties or conditions of any kind.
"""

'''


def remote_code(construction: Mapping[str, Any]) -> dict[str, str]:
    """The files, name to source, with which transformers load a model of this construction by `trust_remote_code`. They
    import torch and transformers only.

    Raises: BundleError where a part cannot be taken out of the package.
    """
    known = vocabulary()
    makers = {name: _symbol(known[name]) for name in sorted(set(_made(construction)))}
    table = "".join(f'        "{name}": {name},\n' for name in makers)
    said = '    """The constructors that the construction in config.json may name."""\n'
    replaced = {
        _symbol(vocabulary): Replacement(
            f"def vocabulary() -> dict[str, Callable[..., Any]]:\n{said}    return {{\n{table}    }}\n",
            (*makers.values(), Imported("collections.abc", "Callable", "Callable"), Imported("typing", "Any", "Any")),
        ),
        Symbol("moestro.export.beside", "write_code"): Replacement(
            "def write_code(model: Any, folder: Any) -> None:\n"
            '    """Nothing: transformers copies the code that a model was loaded with."""\n',
            (Imported("typing", "Any", "Any"),),
        ),
        Symbol("moestro.ops.tables", "new_table"): Replacement(
            "def new_table(rows: int, width: int, dtype: Any = None, device: Any = None) -> Tensor:\n"
            '    """Zeros [rows, width] for a table of rows."""\n'
            "    return torch.zeros(rows, width, dtype=dtype, device=device)\n",
            (Imported("torch", None, "torch"), Imported("torch", "Tensor", "Tensor"), Imported("typing", "Any", "Any")),
        ),
    }
    modeling = bundled(
        [_symbol(MoestroModel), _symbol(MoestroForCausalLM)], replaced, {MoestroConfig.__module__: f".{CONFIGURATION}"}
    )
    configuration = bundled([_symbol(MoestroConfig), _symbol(sizes)])
    said = "{} of a mixture-of-experts language model for transformers, as one file."
    modeling = HEAD.format(what=said.format("The code"), version=__version__) + modeling
    # transformers remembers a model's class by that of its configuration, and that by folder name and source: two
    # folders of one name and other models would share their code if their configurations did not differ
    belongs = f"# Belongs to {MODELING}.py of SHA-256 {hashlib.sha256(modeling.encode()).hexdigest()}.\n\n"
    configuration = HEAD.format(what=said.format("The configuration"), version=__version__) + belongs + configuration
    return {f"{CONFIGURATION}.py": configuration, f"{MODELING}.py": modeling}


def _symbol(value: Callable[..., Any]) -> Symbol:
    return Symbol(value.__module__, value.__name__)


def _made(node: Any) -> Iterator[str]:
    """The constructors that a construction names."""
    if isinstance(node, Mapping):
        yield from (str(value) for key, value in node.items() if key == "make")
        node = list(node.values())
    if isinstance(node, list | tuple):
        for item in node:
            yield from _made(item)
