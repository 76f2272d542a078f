"""What an installed moestro does when Python starts: it watches for one module of transformers.

Once that module is imported, `AutoConfig` knows the model type `moestro`, by a stand-in that imports `moestro.export`
when a folder of that type is loaded. Until then nothing is imported: neither torch, nor transformers, nor moestro
itself, whose place `sys.path` may still change. `MOESTRO_START_UP=off` in the environment switches it off.

Installed beside the package, with `moestro.pth` (Python up to 3.17) and `moestro.start` (from 3.15, PEP 829), which
call `install`.
"""

import os
import sys

TYPE_CHECKING = False  # the module typing takes longer to import than all of this
if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "MOESTRO_START_UP"
WATCHED = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Watch for the module, or register now where it is imported already; a second call changes nothing."""
    if os.environ.get(SWITCH) == "off":
        return
    if WATCHED in sys.modules:
        register()
    elif not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())


class Watch:
    """Finds the watched module where Python's own search does, and nothing else."""

    def find_spec(self, name: str, path: "Any" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        if name != WATCHED:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Registering(spec.loader)  # type: ignore[assignment]
        return spec


class Registering:
    """The loader that a module has, which it also keeps; `register` follows."""

    def __init__(self, loader: "Loader") -> None:
        self.loader = loader

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self.loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register()


def register() -> None:
    """Tell `AutoConfig` of the stand-in, where there is a moestro that has not done better. Whatever goes wrong is
    told, and keeps nobody from using transformers."""
    if "moestro.export" in sys.modules or not found():
        return
    try:
        sys.modules[WATCHED].AutoConfig.register(MoestroConfig.model_type, MoestroConfig, exist_ok=True)
    except Exception as error:
        import warnings

        warnings.warn(f"transformers was not told of moestro's models: {error!r}", RuntimeWarning, stacklevel=2)


def found() -> bool:
    """Whether `moestro` is a package that can be found: a folder that an install left behind is none."""
    from importlib.util import find_spec

    try:
        spec = find_spec("moestro")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


class MoestroConfig:
    """Stands for `moestro.export.MoestroConfig`, and makes instances of that. Its import registers it in this one's
    place, and the models with it.

    Raises: ImportError where moestro is installed and cannot be imported.
    """

    model_type = "moestro"

    def __new__(cls, *arguments: "Any", **keywords: "Any") -> "Any":
        return whole()(*arguments, **keywords)

    @classmethod
    def from_dict(cls, *arguments: "Any", **keywords: "Any") -> "Any":
        return whole().from_dict(*arguments, **keywords)

    @classmethod
    def from_pretrained(cls, *arguments: "Any", **keywords: "Any") -> "Any":
        return whole().from_pretrained(*arguments, **keywords)


def whole() -> "Any":
    """The class that the package has."""
    try:
        from moestro.export import MoestroConfig as Whole
    except ImportError as error:
        raise ImportError(
            f"this model is one of moestro's, which is installed and cannot be imported: {error}. Install moestro[hf] "
            f"anew, or let {SWITCH}=off and trust_remote_code=True run the code in the model's folder"
        ) from error
    return Whole
