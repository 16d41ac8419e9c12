"""The quick tests on the lowest and on the newest versions, on every Python of this machine: `make matrix`.

Each session has an environment of its own, which is deleted behind it, and they come one after another. nox, and not tox, for sessions are functions here:
what is installed is read from the bounds in pyproject.toml, and the table is written behind them.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent))  # nox loads this file alone
from tools import matrix

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lowest", "newest", "table"]


def tried(session: nox.Session, kind: str, pins: list[str]) -> None:
    """Install, run the quick tests, keep what came of it, and delete the environment."""
    rows = matrix.ROWS
    rows.mkdir(parents=True, exist_ok=True)
    name = f"{kind}-{session.python or matrix.HERE}"
    pinned, junit, versions = rows / f"{name}.txt", rows / f"{name}.xml", rows / f"{name}.json"
    for old in (junit, versions):
        old.unlink(missing_ok=True)
    pinned.write_text("\n".join(pins) + "\n")
    begun = time.time()
    try:
        first = [pin for pin in pins if pin.partition("==")[0] == "torch"] or ["torch"]
        session.install("--quiet", *first)  # alone, as in the Makefile: else a range may be met by another build
        session.install("--quiet", "--constraint", str(pinned), "--editable", matrix.WHAT)
        session.install("--quiet", "--constraint", "constraints.txt", "--no-deps", "nudenet")  # for the YOLO graph inside
        session.run("python", "-m", "tools.matrix", "versions", str(versions))
        quick = [str(path) for path in matrix.QUICK]
        session.run("python", "-m", "pytest", *(session.posargs or ["-n", "auto"]), f"--junitxml={junit}", *quick, success_codes=[0, 1])
    finally:
        matrix.keep(name, kind, str(session.python or matrix.HERE), time.time() - begun)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
    if matrix.failed(name):
        session.error(f"{name}: {', '.join(matrix.failed(name))}")


@nox.session(python=matrix.pythons())
def lowest(session: nox.Session) -> None:
    """Every lower bound of pyproject.toml."""
    tried(session, "lowest", matrix.lowest())


@nox.session(python=matrix.pythons())
def newest(session: nox.Session) -> None:
    """The newest PyTorch that pyproject.toml names as tried, and what pip takes of all others."""
    tried(session, "newest", matrix.newest())


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Writes tools/results/matrix-DATE.md of the sessions that ran before."""
    print(matrix.write())
