"""Runs the property tests on random examples: ``make fuzz MINUTES=30``.

Every failing example is written into its test as an ``@example``, a fixed case for every later run. One that has no
literal form, such as a draw from ``st.data()``, is left in the round's log with its seed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / ".hypothesis" / "patches"
LOGS = ROOT / "build" / "fuzz"
NO_TESTS_FAILED, SOME_FAILED = 0, 1
"""Exit codes of pytest; any other is an error of the run itself."""


def draw(seed: int, paths: list[str]) -> tuple[int, str]:
    """Run every property test once on the examples of ``seed``; return pytest's exit code and output."""
    command = [
        sys.executable, "-m", "pytest", *paths, "-m", "hypothesis", "--hypothesis-profile=fuzz",
        f"--hypothesis-seed={seed}", "-p", "no:cacheprovider",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def patches() -> set[Path]:
    """Return the patches that hypothesis has written so far."""
    return set(PATCHES.glob("*.patch"))


def keep(found: set[Path]) -> None:
    """Write the failing examples into their tests, in the project's format."""
    for patch in sorted(found):
        subprocess.run(["git", "apply", str(patch)], cwd=ROOT, check=True)
        for name in re.findall(r"^\+\+\+ (?:b/|\./)?(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE):
            import_example(ROOT / name)
        patch.unlink()
    subprocess.run([sys.executable, "-m", "ruff", "check", "--fix", "--quiet", "."], cwd=ROOT, check=False)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", "."], cwd=ROOT, check=True)


def import_example(path: Path) -> None:
    """Import ``example`` where a test file imports ``given`` alone."""
    text = path.read_text(encoding="utf-8")
    if not re.search(r"^from hypothesis import .*\bexample\b", text, re.MULTILINE):
        text = re.sub(
            r"^from hypothesis import ", "from hypothesis import example, ", text, count=1, flags=re.MULTILINE
        )
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Draw until the time is up; return 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("paths", nargs="*")
    given = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    end, seed, failed = time.monotonic() + 60 * given.minutes, given.seed, 0
    while time.monotonic() < end:
        known = patches()
        code, output = draw(seed, given.paths)
        if code not in (NO_TESTS_FAILED, SOME_FAILED):
            sys.stderr.write(output)
            return code
        if code == SOME_FAILED:
            failed += 1
            (LOGS / f"{seed}.log").write_text(output, encoding="utf-8")
            keep(patches() - known)
            print(f"seed {seed}: failed, see {LOGS / f'{seed}.log'} and git diff", flush=True)
        seed += 1
    print(f"{seed - given.seed} rounds, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
