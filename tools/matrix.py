"""What the sessions of noxfile.py share: versions from the bounds in pyproject.toml, what came of the quick tests, and the table of it.

make matrix                              # all sessions, then tools/results/matrix-DATE.md
nox -s lowest table -- -n 0              # one of them, in one process
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
ROWS = REPOSITORY / ".nox" / "matrix"
HERE = ".".join(platform.python_version_tuple()[:2])
KNOWN = tuple(f"3.{minor}" for minor in range(11, 15))
"""Versions of Python that are looked for."""
QUICK = tuple(
    Path("tests", f"test_{name}.py")
    for name in ("private", "private_libraries", "detect", "rewrite", "fx", "export", "onnx", "saving", "training", "cli")
)
"""The quick tests: detection, rewrite, both back ends, export, saved folders, training steps and the command; without what is marked slow."""
EXTRAS = ("zoo", "test")
WHAT = f".[{','.join(EXTRAS)}]"
SHOWN = ("torch", "torchvision", "transformers", "timm", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnx-shape-inference", "numpy", "networkx", "safetensors", "click", "rich", "matplotlib", "jinja2", "tomlkit")  # fmt: skip


def project(path: Path = REPOSITORY / "pyproject.toml") -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def required(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names with their bounds, of the package and of the extras that the quick tests need."""
    extras = data["project"]["optional-dependencies"]
    waiting = [*data["project"]["dependencies"], *(text for extra in EXTRAS for text in extras[extra])]
    while waiting:
        found = re.fullmatch(r"([\w.-]+)(?:\[([^\]]*)\])?(.*)", waiting.pop(0))
        assert found is not None
        if found[1] == data["project"]["name"]:  # extras of its own
            waiting += [text for extra in str(found[2]).split(",") for text in extras[extra.strip()]]
        else:
            yield found[1], found[3]


def lowest(data: dict[str, Any] | None = None) -> list[str]:
    """A pin of every lower bound."""
    pins = []
    for name, bounds in required(project() if data is None else data):
        low = re.search(r">=\s*([\w.]+)", bounds)
        if low is None:
            raise ValueError(f"{name} has no lower bound in pyproject.toml.")
        pins.append(f"{name}=={low[1]}")
    return pins


def newest(data: dict[str, Any] | None = None) -> list[str]:
    """The pins of what comes in several builds, or later than what else goes with it; pip takes the newest of the rest."""
    return list((project() if data is None else data)["tool"]["matrix"]["newest"])


def pythons() -> list[str]:
    """The versions of Python that run on this machine by their names; a shim that asks to be set up first does not."""
    found = [version for version in KNOWN if (path := shutil.which(f"python{version}")) and _runs(path)]
    return found or [HERE]


def _runs(path: str) -> bool:
    return subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0


def missing() -> list[str]:
    return [version for version in KNOWN if version not in pythons()]


@dataclass
class Row:
    """What came of one session.

    Attributes:
        tests: passed, failed, skipped; empty where they did not run.
        failures: names of the tests that failed.
    """

    kind: str
    python: str
    seconds: float
    date: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tests_seconds: float = 0.0


def read(junit: Path) -> tuple[dict[str, int], list[str], float]:
    """Counts, failed tests and duration, of a report of pytest."""
    suite = next(ET.parse(junit).getroot().iter("testsuite"))
    broken = [case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None]
    failures = sorted({f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in broken})
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "skipped")}
    return (
        {"passed": counts["tests"] - counts["skipped"] - len(failures), "failed": len(failures), "skipped": counts["skipped"]},
        failures,
        float(suite.get("time", 0)),
    )


def keep(name: str, kind: str, python: str, seconds: float) -> Row:
    """Write down what came of a session, a row of the table."""
    row = Row(kind, python, seconds, str(date.today()))
    if (versions := ROWS / f"{name}.json").exists():
        row.versions = json.loads(versions.read_text())
    if (junit := ROWS / f"{name}.xml").exists():
        row.tests, row.failures, row.tests_seconds = read(junit)
    (ROWS / f"{name}.row").write_text(json.dumps(asdict(row), indent=1))
    return row


def rows() -> list[Row]:
    return [Row(**json.loads(path.read_text())) for path in sorted(ROWS.glob("*.row"))]


def failed(name: str) -> list[str]:
    """Why a session failed: its failed tests, or that they did not run."""
    row = Row(**json.loads((ROWS / f"{name}.row").read_text()))
    return row.failures if row.tests else ["the tests did not run"]


def versions() -> dict[str, str]:
    """What this environment has of the packages in the table, and its Python."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def text(rows: list[Row], absent: list[str], machine: str) -> str:
    """The table: a column for each session."""
    days = sorted({row.date for row in rows})
    lines = [
        f"# The quick tests on the lowest and on the newest versions, {' to '.join(dict.fromkeys((days[0], days[-1])))}",
        "",
        f"Made by `make matrix` on {machine}. Lowest: every lower bound of pyproject.toml. Newest: {', '.join(newest())}, and what pip takes of the others.",
        f"Tests: {', '.join(path.stem.removeprefix('test_') for path in QUICK)}. Durations are with other work on the machine.",
        "",
        "| | " + " | ".join(row.kind for row in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    cells = [("Python", [row.versions.get("python", row.python) for row in rows])]
    cells += [(name, [row.versions.get(name, "-") for row in rows]) for name in SHOWN]
    cells += [(key, [str(row.tests.get(key, "did not run")) for row in rows]) for key in ("passed", "failed", "skipped")]
    cells += [("tests, s", [f"{row.tests_seconds:.0f}" for row in rows]), ("in all, s", [f"{row.seconds:.0f}" for row in rows])]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in cells]
    lines += ["", "## Failed", ""]
    lines += [f"* {row.kind}, Python {row.python}: `{name}`" for row in rows for name in row.failures] or ["None."]
    lines += ["", "## Not run", ""]
    lines += [f"* Python {version}: no `python{version}` that starts on this machine." for version in absent]
    done = {(row.kind, row.python) for row in rows if row.tests}
    lines += [
        f"* {kind} on Python {version}: its tests did not run; see the output of the session."
        for kind in ("lowest", "newest")
        for version in pythons()
        if (kind, version) not in done
    ]
    return "\n".join(lines) + "\n"


def write() -> str:
    """Write the table of the sessions that ran; gives what it says of those that did not, and where it is."""
    if not rows():
        raise SystemExit("No session ran: nox -s lowest newest table")
    path = REPOSITORY / "tools" / "results" / f"matrix-{date.today()}.md"
    path.write_text(text(rows(), missing(), f"{platform.system()} {platform.machine()}"))
    return f"{path.read_text().partition('## Not run')[2].strip()}\n{path}"


if __name__ == "__main__":
    assert sys.argv[1] == "versions"
    Path(sys.argv[2]).write_text(json.dumps(versions(), indent=1))
