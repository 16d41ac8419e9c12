"""The job of `laurel-rewrite doctor`: what is installed, what the machine has, and what works. Nothing is imported that may be missing."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from laurel_rewrite import __version__
from laurel_rewrite.errors import reason
from laurel_rewrite.stages import Listener, silent

NAME = "laurel-rewrite"
_OTHERS = frozenset({"dev", "test", "docs"})
"""The extras of those who change this package; what they bring is no affair of those who use it."""
CORE = ("capture, rewrite, verify", "export, run in onnxruntime")
COMPILE = "torch.compile"


@dataclass(frozen=True)
class Package:
    """One that is needed, or that an extra brings.

    Attributes:
        name: as a registry has it.
        wanted: versions, as this package declares them; "" for any.
        installed: version; "" where it is missing.
        extra: that brings it; "" for what is always needed.
    """

    name: str
    wanted: str
    installed: str
    extra: str = ""

    @property
    def state(self) -> str:
        """In a word or two."""
        if not self.installed:
            return f'missing: pip install "{NAME}[{self.extra}]"' if self.extra else "missing"
        return "ok" if SpecifierSet(self.wanted).contains(self.installed, prereleases=True) else "outside what was tested"


@dataclass(frozen=True)
class Trial:
    """Something that was tried.

    Attributes:
        name: what.
        works: None where that could not be found out.
        detail: what came of it, or why not.
        seconds: that it took.
    """

    name: str
    works: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class Findings:
    """All that was found out."""

    python: Package
    packages: tuple[Package, ...]
    machine: dict[str, str]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether the core works: a model is rewritten, verified and exported."""
        return all(trial.works for trial in self.trials if trial.name in CORE)

    def to_dict(self) -> dict[str, Any]:
        return {
            "laurel_rewrite": __version__,
            "healthy": self.healthy,
            "python": asdict(self.python) | {"state": self.python.state},
            "packages": [asdict(one) | {"state": one.state} for one in self.packages],
            "machine": self.machine,
            "works": [asdict(trial) for trial in self.trials],
            "notes": list(self.notes),
        }


def examine(*, wait: float = 13.0, listener: Listener = silent) -> Findings:
    """Look at everything, and try what should work.

    Args:
        wait: seconds for torch.compile, whose first run on a machine takes long.
        listener: is told of the stages.
    """
    child = _begin_compiling() if metadata_of("torch") else None
    try:
        begin = time.perf_counter()
        with listener("look"):
            python, packages, notes = _packages()
            machine = _machine()
        trials = [_tried(CORE[0], "rewritten", listener), _tried(CORE[1], "exported", listener)]
        with listener(COMPILE) as stage:
            trials.append(_compiled(child, begin, wait))
            stage.done("works" if trials[-1].works else trials[-1].detail)
    finally:
        if child is not None:
            _end(child)
    return Findings(python, packages, machine, tuple(trials), notes)


def metadata_of(name: str) -> str:
    """The version of a package; "" where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _packages() -> tuple[Package, tuple[Package, ...], tuple[str, ...]]:
    """Python, and the packages in this package's own metadata; and what is to be said of these."""
    try:
        own = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        note = f"{NAME} is not installed (it runs from a folder), so that nothing says which versions it wants."
        return Package("python", "", platform.python_version()), (), (note,)
    python = Package("python", _bounds(SpecifierSet(own.metadata["Requires-Python"] or "")), platform.python_version())
    extras = ["", *(extra for extra in own.metadata.get_all("Provides-Extra") or () if extra not in _OTHERS)]
    wanted = [Requirement(line) for line in own.requires or ()]
    found: dict[tuple[str, str], Package] = {}
    for extra in extras:
        for one in wanted:
            if one.marker is None if not extra else one.marker is not None and one.marker.evaluate({"extra": extra}):
                found[extra, one.name] = Package(one.name, _bounds(one.specifier), metadata_of(one.name), extra)
    note = f"The metadata that is read is that of version {own.version}, and what runs is {__version__}: install it again."
    return python, tuple(found.values()), () if own.version == __version__ else (note,)


def _bounds(wanted: SpecifierSet) -> str:
    """The lower one first."""
    return ",".join(sorted(map(str, wanted), reverse=True))


def _machine() -> dict[str, str]:
    """What onnxruntime, PyTorch and this package see; a package that is missing or broken says so in its line."""
    looks: dict[str, Callable[[], str]] = {
        "system": platform.platform,
        "processor": _processor,
        "PyTorch": _torch,
        "GPU": _gpu,
        "onnxruntime": _onnxruntime,
        "C++ compiler": _compiler,
        "cache": _cache,
    }
    found = {}
    for name, look in looks.items():
        try:
            found[name] = look()
        except Exception as error:  # whatever a broken package raises
            found[name] = reason(error)
    return found


def _processor() -> str:
    from laurel_rewrite.profiling.sessions import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores for this process"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{', '.join(names) or 'none'}; PyTorch is {built}"


def _onnxruntime() -> str:
    import onnxruntime

    from laurel_rewrite.profiling.sessions import settings

    providers = ", ".join(onnxruntime.get_available_providers())
    return f"{onnxruntime.__version__}, measures with {settings().threads} threads; providers: {providers}"


def _compiler() -> str:
    from laurel_rewrite.private import compilers

    names = compilers()
    found = next((path for name in names if (path := shutil.which(name))), None)
    return found or f"none ({', '.join(names)}): torch.compile on the CPU needs one, such as g++"


def _cache() -> str:
    from laurel_rewrite.operators.onnx_function import cache_folder

    folder = cache_folder()
    if folder is None:
        return "none is kept"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder}, cannot be written: {error.strerror}"
    files = list(folder.glob("*.onnx"))
    return f"{folder}, can be written; {len(files)} files of {sum(file.stat().st_size for file in files) / (1 << 20):.1f} MiB"


def _tried(name: str, function: str, listener: Listener) -> Trial:
    """One of `laurel_rewrite.app.trials`, in this process."""
    begin = time.perf_counter()
    with listener(name) as stage:
        try:
            from laurel_rewrite.app import trials

            works, detail = True, getattr(trials, function)()
        except Exception as error:  # what a broken installation raises
            works, detail = False, reason(error)
        stage.done(detail)
    return Trial(name, works, detail, time.perf_counter() - begin)


def _begin_compiling() -> subprocess.Popen[str]:
    """torch.compile, tried beside the other trials."""
    command = [sys.executable, "-W", "ignore", "-m", "laurel_rewrite.app.trials"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)


def _compiled(child: subprocess.Popen[str] | None, begin: float, wait: float) -> Trial:
    if child is None:
        return Trial(COMPILE, False, "PyTorch is missing", 0.0)
    try:
        output, _ = child.communicate(timeout=max(wait - (time.perf_counter() - begin), 0.1))
    except subprocess.TimeoutExpired:
        detail = "not finished; the first compilation on a machine takes long: try again with --wait 120"
        return Trial(COMPILE, None, detail, time.perf_counter() - begin)
    detail = (output.strip().splitlines() or [f"the process ended with {child.returncode}"])[-1]
    return Trial(COMPILE, child.returncode == 0, detail, time.perf_counter() - begin)


def _end(child: subprocess.Popen[str]) -> None:
    """Its compilers end with it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()
