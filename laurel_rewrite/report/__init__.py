"""The report: `report.json`, whose form `schema.json` documents, and the page made of it, one file that needs no network."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from laurel_rewrite import __version__
from laurel_rewrite.command_line import command_line
from laurel_rewrite.detection.site import short
from laurel_rewrite.files.written import json_of
from laurel_rewrite.report.answer import answer
from laurel_rewrite.report.words import breakable, count, figure, places, settings, shortened, size, skipped_of

JSON, HTML = "report.json", "report.html"
SCHEMA_VERSION = 1
_MADE_WITH = ("torch", "onnx", "onnxruntime")
_NOTHING: dict[str, Any] = {
    "title": "", "model": None, "sites": [], "rejected": [], "plan": None, "skipped": [], "parameters": None, "notes": [], "verification": [], "profile": None,
    "training": None, "comparison": None, "out": "", "files": [],
}  # fmt: skip


def write_report(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a folder; returns the content of the former.

    Args:
        data: as `schema.json` describes it; what is not given is empty.
        folder: which exists.
    """
    text = json_of(
        {"schema": SCHEMA_VERSION, "version": __version__, "versions": _versions(), "command": command_line(), **_NOTHING, **data}
    )
    (folder / JSON).write_text(text, encoding="utf-8")
    report: dict[str, Any] = json.loads(text)
    (folder / HTML).write_text(page(report), encoding="utf-8")
    return report


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _MADE_WITH}}


def page(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: the content of a `report.json`.
    """
    import jinja2

    from laurel_rewrite.report.comparison_plots import comparison_figures
    from laurel_rewrite.report.plots import figures

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "short": shortened,
        "settings": settings,
        "size": size,
        "count": count,
        "place": lambda where: breakable(short(where)),
        "name": breakable,
    }
    environment.globals |= {"figure": figure, "places": places, "skipped_of": skipped_of}
    template = environment.from_string(_resource("page.html.jinja"))
    profile = report["profile"] or {"rows": []}
    rows = profile["rows"]
    compared = comparison_figures(report["comparison"]) if report["comparison"] else {}
    return template.render(
        report=report, sentences=answer(report), figures={**figures(report), **compared}, style=_resource("page.css"), script=_resource("page.js"), today=date.today(),
        planned={site["id"]: site for site in report["plan"]["sites"]} if report["plan"] else {},
        times={site["site"]: site for row in rows[1:2] for site in row["time"]["sites"]},
        ops=sorted({op for row in rows for counts in (row["ops"]["before"], row["ops"]["after"]) for op in counts}),
    )  # fmt: skip


def schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    return dict(json.loads(_resource("schema.json")))


@cache
def _resource(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
