"""The job of `laurel-rewrite profile`: measure ONNX files, and write the report of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laurel_rewrite.app.job import renamed
from laurel_rewrite.app.trained import as_graphs
from laurel_rewrite.files.drafts import check_out, replacing
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.graph.feeds import read_feeds
from laurel_rewrite.profiling import Profile
from laurel_rewrite.profiling import profile as measure
from laurel_rewrite.report import HTML, JSON, write_report
from laurel_rewrite.stages import Listener, silent


def run(
    models: Sequence[Path],
    out: Path,
    *,
    shapes: dict[str, list[int]] | None = None,
    inputs: Path | None = None,
    force: bool = False,
    listener: Listener = silent,
    **options: Any,
) -> tuple[dict[str, Any], Profile]:
    """Profile files against the first; the report, as `report.json` holds it, and the profile.

    Args:
        models: ONNX files, and folders of rewritten models (`laurel_rewrite.app.trained`).
        out: folder for `report.html`, `report.json` and the raw traces, which appear when all is done.
        shapes, options: see `profile`.
        inputs: an .npz file.
        force: replace files in `out` that are no earlier result, too.
        listener: is told of the stages.

    Raises:
        ConfigError: see `profile`.
    """
    check_out(out, "profile", (JSON, HTML), force=force)
    feeds = read_feeds(inputs) if inputs is not None else None
    with replacing(out, "profile", force=force, keep=[*models, *([inputs] if inputs is not None else [])]) as draft:
        past = options.get("prompt") is not None or options.get("past") is not None
        with (
            as_graphs(models, draft, inputs=inputs, past=past, seed=options.get("seed", 0), listener=listener) as (graphs, names, made),
            listener("profile") as stage,
        ):
            measured = measure(graphs, names=names, inputs=feeds, shapes=shapes, traces=draft, progress=stage.progress, **options)
            result = renamed(measured, made)
            stage.done(
                ", ".join(f"{row.name} {row.latency.ratio:.3f}x" for row in result.rows[1:]) or f"{result.rows[0].latency.median_ms:.2f} ms"
            )
        files = sorted([*(file.name for file in draft.iterdir()), JSON, HTML, MANIFEST])
        title = (
            " against ".join([", ".join(row.name for row in result.rows[1 : len(graphs)]), result.rows[0].name])
            if len(graphs) > 1
            else result.rows[0].name
        )
        data = {"title": title, "profile": result.to_dict(), "out": str(out), "files": files}
        write_report(data, draft)
    return data, result
