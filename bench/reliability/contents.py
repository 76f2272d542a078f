"""What lies in a folder: all of it but what a clock wrote, and whether anything under its own name is half-written."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moestro.data.shards import SPLITS, open_shard, read_meta
from moestro.formats.shards import header
from moestro.ops.whole_files import HASHES, require_intact
from moestro.train.checkpoint import verified_state

# what a clock, or the number of processes that it took, decides; checksums and sizes of what contains such entries
CLOCK = {"time", "seconds", "created", "finished", "tokens_per_s", "peak_host_bytes"} | {
    *("metrics_bytes", "metrics_sha256", "checksum", "done.json", "metrics.jsonl")
}
SESSIONS = {"lock", "environment.json"}


def contents(root: Path) -> dict[str, str]:
    """{path: hash} of every file below `root`, hidden ones too, without what a clock says."""
    return {path.relative_to(root).as_posix(): digest(path) for path in files_below(root) if path.name not in SESSIONS}


def files_below(root: Path) -> Iterator[Path]:
    """All files, in order."""
    yield from (path for path in sorted(root.rglob("*")) if path.is_file())


def digest(path: Path) -> str:
    """SHA-256 of a file; of JSON without the entries of `CLOCK`, of pages only that they are whole."""
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            content = json.dumps(timeless(json.loads(content)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            content = json.dumps([timeless(json.loads(line)) for line in content.splitlines()]).encode()
        elif path.suffix == ".html":
            content = content[-16:].strip()
    except ValueError:
        # half of it: no other file has this hash
        pass
    return hashlib.sha256(content).hexdigest()


def timeless(value: Any) -> Any:
    """JSON without the entries of `CLOCK`."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in CLOCK}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def half_written(root: Path) -> list[str]:
    """What lies under its own name and cannot be read whole: files that are no JSON, YAML or safetensors; checkpoints,
    token shards and files beside a list of hashes that do not have theirs. Of metrics.jsonl the last line may be torn:
    it is cut when training goes on. Folders and files under temporary names are passed over."""
    found = []
    for path in files_below(root):
        inside = path.relative_to(root)
        if not any(part.startswith(".") for part in inside.parts):
            try:
                require_readable(path)
            except (ValueError, RuntimeError, OSError, yaml.YAMLError) as error:
                found.append(f"{inside}: {error}")
    return found


def require_readable(path: Path) -> None:
    """Raises: ValueError, RuntimeError, OSError or YAMLError where a file, or what it stands for, is not whole."""
    if path.name == "state.json":
        verified_state(path.parent)
    elif path.name == "meta.json":
        for split in SPLITS:
            open_shard(path.parent, split, read_meta(path.parent))
    elif path.name == HASHES:
        require_intact(path.parent)
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".jsonl":
        for line in path.read_bytes().split(b"\n")[:-1]:
            json.loads(line)
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_bytes())
    elif path.suffix == ".safetensors":
        header(path)
    elif path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("the page has no end")
