"""What moestro depends on: pins, ranges and licences of all that is installed for it, and known vulnerabilities.

    python -m tools.dependencies                          # pins, ranges, licences
    python -m tools.dependencies --advisories PIP_AUDIT   # what pip-audit (this program) finds in constraints.txt

The first starts at pyproject.toml and follows what installed packages require. Wrong are a package without a pin, a pin
outside of a declared range, and a licence that is not known to be free: permissive ones everywhere, weak copyleft in
extras only. The second takes a package that pip-audit skipped for not audited: where it reaches no
database it skips all, says that it found nothing, and exits with 0.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
PERMISSIVE = r"apache|\bmit\b|bsd|0bsd|isc\b|psf|python software|zlib|cc0|cnri|bsl-1|llvm|\bmpl|mozilla|unlicense"
WEAK_COPYLEFT = r"lgpl|lesser general public"


def declared() -> dict[str, list[Requirement]]:
    """{"core" or extra: what pyproject.toml asks for}"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(each) for each in listed] for name, listed in lists.items()}


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def closure(requirements: Sequence[Requirement]) -> Iterator[tuple[str, Requirement]]:
    """(who asks, what for) of these and of all that they require, as far as it is installed and meant for here."""
    left = [("moestro", requirement) for requirement in requirements]
    seen = set[tuple[str, tuple[str, ...]]]()
    while left:
        asker, wanted = left.pop()
        name, extras = canonical(wanted.name), tuple(sorted(wanted.extras))
        if name == "moestro":
            continue
        yield asker, wanted
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for inner in map(Requirement, _required(name)):
            chosen = extras or ("",)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in chosen):
                left.append((name, inner))


def _required(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def licence(name: str) -> str:
    """What an installed package says of its licence; nothing where it does not.

    Raises: PackageNotFoundError for one that is not installed.
    """
    said = metadata(name)
    named = [said.get("License-Expression"), *_classified(said), (said.get("License") or "").strip().split("\n")[0]]
    return next((each for each in named if each and each != "UNKNOWN"), "")


def _classified(said: Any) -> list[str]:
    found = [each.split(" :: ")[-1] for each in said.get_all("Classifier") or [] if each.startswith("License ::")]
    return [" OR ".join(found)] if found else []


def is_allowed(text: str, core: bool) -> bool:
    """Whether every licence that applies is free: permissive, or weak copyleft outside of the core."""
    kinds = PERMISSIVE if core else f"{PERMISSIVE}|{WEAK_COPYLEFT}"
    together = re.split(r" AND | WITH ", text)
    choices = [[choice for choice in each.split(" OR ") if re.search(kinds, choice.lower())] for each in together]
    return bool(text) and all(choices)


def problems(wanted: dict[str, list[Requirement]], pinned: dict[str, str]) -> tuple[list[str], list[str]]:
    """(what is wrong, in words; packages that are not installed, whose licences and requirements nobody read)"""
    found, absent = dict[str, None](), set[str]()
    for extra, requirements in wanted.items():
        for asker, requirement in closure(requirements):
            name = canonical(requirement.name)
            version = pinned.get(name)
            if version is None:
                found[f"{name}: {asker} requires it, constraints.txt has no pin"] = None
            elif not requirement.specifier.contains(version, prereleases=True):
                found[f"{name}=={version}: {asker} requires {requirement.specifier}"] = None
            try:
                said = licence(name)
            except PackageNotFoundError:
                absent.add(name)
                continue
            if not is_allowed(said, extra == "core"):
                found[f"{name}: licence {said or 'unknown'!r} of a package of {extra}"] = None
    return list(found), sorted(absent)


def advisories(audit: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(known vulnerabilities, packages that were not audited) of what pip-audit writes as JSON."""
    each = audit["dependencies"]
    known = [f"{one['name']}=={one['version']}: {hole['id']}" for one in each for hole in one.get("vulns", [])]
    return known, [one["name"] for one in each if "skip_reason" in one]


def audited(program: str, may_skip: bool) -> int:
    """Run pip-audit on constraints.txt, and tell; 1 for vulnerabilities, 3 where it could not look for all and may
    not skip any."""
    unknown = 0 if may_skip else 3
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "audit.json")
        command = [program, "-r", str(PINS), "--no-deps", "--disable-pip", "-f", "json", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not out.is_file():
            print(f"nothing was audited: {done.stderr.strip().splitlines()[-1:]}")
            return unknown
        known, skipped = advisories(json.loads(out.read_text(encoding="utf-8")))
    print("\n".join(known) or "no known vulnerability in what was audited")
    if skipped:
        print(
            f"not audited, because no database knew them or could be reached: {len(skipped)} of {len(pins())} packages"
        )
    return 1 if known else unknown if skipped else 0


def main(words: list[str] | None = None) -> int:
    """Check, and tell; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--advisories", metavar="PIP_AUDIT", help="ask for known vulnerabilities instead")
    parser.add_argument("--may-skip", action="store_true", help="with it: 0 where packages could not be audited")
    options = parser.parse_args(words)
    if options.advisories:
        return audited(options.advisories, options.may_skip)
    found, absent = problems(declared(), pins())
    print("\n".join(found) or f"{len(pins())} pins: all declared ranges and licences hold")
    if absent:
        print(f"not installed, so that their licences were not read: {', '.join(absent)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
