"""What a run ran on: versions, machine, source commit."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import moestro
from moestro.ops import native
from moestro.ops.huge_pages import huge_pages

PACKAGES = ("numpy", "safetensors", "tokenizers")


def describe_machine(device: torch.device) -> dict:
    """Versions and hardware that can change the last bits of a result."""
    return {
        "commit": source_commit(),
        "python": sys.version.split()[0],
        # torch's own version names its build (+cu130), the installed package's does not
        "packages": {
            "moestro": moestro.__version__,
            "torch": str(torch.__version__),
            **{name: version(name) for name in PACKAGES},
        },
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "native_kernels": native.status(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def version(package: str) -> str | None:
    """Installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """Commit of the checkout this package runs from (`+` where files differ from it); None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = git(root, "rev-parse", "HEAD")
        return commit + ("+" if git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def git(root: Path, *arguments: str) -> str:
    """Output of a git command in `root`."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def cpu_name() -> str:
    """Model of the processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
