"""The code beside a model that the package's own classes save."""

from pathlib import Path
from typing import Any

from moestro.ops.whole_files import forget_hashes
from moestro.train.durable import write_text


def write_code(model: Any, folder: Any) -> None:
    """Write the code with which others load `model` into `folder`, and name it in the model's configuration. A model
    without a construction has none. Hashes of what the folder held before are forgotten."""
    # what travels is taken out of the module that asks for this
    from moestro.export.remote_code import AUTO_MAP, remote_code

    if model.config.construction is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    forget_hashes(Path(folder))
    for name, source in remote_code(model.config.construction).items():
        write_text(Path(folder) / name, source)
    model.config.auto_map = dict(AUTO_MAP)
