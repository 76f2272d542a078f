"""Compile the C kernels of this folder into one library beside them: `python -m moestro.ops.native.build`.

Standard library only, and nothing of this package, because installing the package runs this file before the package
can be imported (`hatch_build.py`). Every source is compiled once for each variant of the processor in `VARIANTS`; the
library says at run time which of them this machine can run. Reads CC for the compiler.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "kernels.so"
# From slowest to fastest: name, flags. `runtime.c` asks the processor for the same features.
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# This one is compiled once: it starts the others.
RUNTIME = "runtime.c"


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def fingerprint() -> str:
    """Digest of everything the library is made from: a library made from other sources is never loaded."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def variants(cc: str) -> dict[str, list[str]]:
    """The variants that exist for this machine's kind of processor and that the compiler knows."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {name: flags for name, flags in VARIANTS.items() if not flags or _knows(cc, flags)}
    return {"baseline": []}


def _knows(cc: str, flags: list[str]) -> bool:
    """Whether a compiler takes these flags: older ones do not know newer processors."""
    try:
        done = subprocess.run([cc, *flags, "-x", "c", "-fsyntax-only", os.devnull], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def compiler() -> str:
    """The C compiler: CC, or the first of cc, gcc and clang.

    Raises: BuildError where there is none.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"no C compiler ({', '.join(names)})")
    return found


def build(library: Path = LIBRARY, known: dict[str, list[str]] | None = None) -> Path:
    """Compile and link the library; the old one stays until the new one is whole. `known` are the variants with their
    flags, those of this machine's kind where it is None.

    Raises: BuildError where there is no compiler or it fails.
    """
    cc = compiler()
    known = variants(cc) if known is None else known
    with tempfile.TemporaryDirectory() as folder:
        define = [f'-DFINGERPRINT="{fingerprint()}"', f'-DVARIANTS="{" ".join(known)}"']
        objects = [_compile(cc, FOLDER / RUNTIME, Path(folder, "runtime.o"), define)]
        for source in sorted(FOLDER.glob("*.c")):
            if source.name != RUNTIME:
                for name, flags in known.items():
                    target = Path(folder, f"{source.stem}_{name}.o")
                    objects.append(_compile(cc, source, target, [*flags, f"-DVARIANT={name}"]))
        # on the same file system, so that replacing is atomic
        whole = library.with_name(f"{library.name}.{os.getpid()}")
        try:
            _run([cc, "-shared", "-o", str(whole), *objects, "-lpthread", "-lm", *_dynamic_loader()])
            whole.replace(library)
        finally:
            whole.unlink(missing_ok=True)
    return library


def _dynamic_loader() -> list[str]:
    return ["-ldl"] if platform.system() == "Linux" else []


def _compile(cc: str, source: Path, target: Path, flags: list[str]) -> str:
    _run([cc, *FLAGS, *flags, "-c", str(source), "-o", str(target)])
    return str(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def is_current() -> bool:
    """Whether the library exists and was made from these sources."""
    return LIBRARY.exists() and fingerprint().encode() in LIBRARY.read_bytes()


def main() -> int:
    """Build where that is needed; returns the exit code."""
    if is_current():
        print(f"native kernels: {LIBRARY} is up to date")
        return 0
    try:
        print(f"native kernels: built {build()}")
    except (BuildError, OSError) as error:
        print(f"native kernels: not built, and not needed: slower ones take their place. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
