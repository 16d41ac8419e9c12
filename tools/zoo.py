"""Survey: detection on the architectures of timm, transformers and torchvision, beside counts that were not taken from a tracer.

    python tools/zoo.py                     # all; writes a dated table under tools/results/
    python tools/zoo.py --sample            # the fixed sample; writes nothing
    python tools/zoo.py timm:resnet50 ...   # some, whether their counts are known or not

`zoo.json` holds the expected numbers: [identity, projection], null where nobody counted. The identity counts were read from the
graphs that autograd recorded, the projections from the modules (one for each `downsample`). Models are built from their
configurations on the meta device, transformers' architectures with at most four layers.

Exit status: 1 where a count differs, or where more than 2 % of the models cannot be captured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from laurel_rewrite.profiling import processor

HERE = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((HERE / "zoo.json").read_text())
LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
BATCH, TOKENS, MOST_LAYERS = 3, 17, 4


@dataclass
class Row:
    """One model's line of the table; seconds are wall-clock."""

    model: str
    expected: tuple[int | None, int | None]
    nodes: int = 0
    kinds: Counter[str] | None = None
    capture: float = 0.0
    detection: float = 0.0
    failure: str = ""

    @property
    def differs(self) -> bool:
        pairs = zip(self.expected, ("identity", "projection"), strict=True)
        return self.kinds is not None and any(count is not None and count != self.kinds[kind] for count, kind in pairs)

    def cells(self) -> list[str]:
        found = self.kinds or Counter()
        counts = [
            f"{found[kind] if self.kinds is not None else '-'} / {'?' if count is None else count}"
            for kind, count in zip(("identity", "projection"), self.expected, strict=True)
        ]
        share = f"{100 * self.detection / self.capture:.1f}" if self.kinds is not None else "-"
        remark = self.failure or ("DIFFERS" if self.differs else "")
        return [
            self.model, str(self.nodes), *counts, str(found["partial"]), f"{self.capture:.2f}", f"{self.detection:.3f}", share, remark,
        ]  # fmt: skip


def build(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model on the meta device with the inputs of its forward."""
    import torch

    from laurel_rewrite.sources.models import build as build_model

    prefix, _, name = spec.partition(":")
    if prefix != "hf":
        built = build_model(spec, device="meta", batch=BATCH)
        return built.model, built.args, built.kwargs
    from transformers import CONFIG_MAPPING, AutoModel  # which imports torchvision

    config = CONFIG_MAPPING[name]()
    for field in LAYERS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > MOST_LAYERS:
            with contextlib.suppress(AttributeError, NotImplementedError):  # derived from other fields
                setattr(config, field, MOST_LAYERS)
    if getattr(config, "layer_types", None) is not None:
        with contextlib.suppress(AttributeError):  # derived as well
            config.layer_types = config.layer_types[:MOST_LAYERS]
    with torch.device("meta"):
        model = AutoModel.from_config(config).train()
    if name in EXPECTED["images"]:
        size = getattr(config, "image_size", 224)
        size = size if isinstance(size, int) else size[0] if isinstance(size, list | tuple) else 224
        return model, (), {"pixel_values": torch.zeros(BATCH, getattr(config, "num_channels", 3), size, size, device="meta")}
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return model, (), {"input_ids": ids, **decoder}


def survey(spec: str) -> Row:
    """Build, capture and detect, each apart, so that the times can be told apart."""
    from laurel_rewrite.detection.sites import sites_of_capture
    from laurel_rewrite.graph.capture import capture

    identity, projection = EXPECTED["models"].get(spec, (None, None))
    row = Row(spec, (identity, projection))
    try:
        model, args, kwargs = build(spec)
        begin = time.perf_counter()
        (captured, *_), _ = capture(model, args, kwargs)
        row.capture = time.perf_counter() - begin
    except Exception as error:  # whatever a library of models raises
        row.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        return row
    row.nodes = len(captured.graph.nodes)
    begin = time.perf_counter()
    sites = sites_of_capture(captured)
    row.detection = time.perf_counter() - begin
    row.kinds = Counter(site.kind for site in sites)
    return row


def table(rows: list[Row], seconds: float) -> str:
    """The table in Markdown, with what it was made under."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "torchvision"))
    failures = [row for row in rows if row.failure]
    shares = sorted(row.detection / row.capture for row in rows if row.kinds is not None)
    heading = ["model", "nodes", "identity", "projection", "partial", "capture s", "detection s", "% of capture", "remark"]
    lines = [
        f"# Detection on {len(rows)} architectures, {date.today()}",
        "",
        f"Python {platform.python_version()}, {packages}; {processor()}, one thread, models on the meta device, {seconds:.0f} s in all.",
        "Counts are found / expected; ? where nobody counted. Seconds are of one run.",
        "",
        f"* differences: {sum(row.differs for row in rows)}",
        f"* not captured: {len(failures)} of {len(rows)} ({100 * len(failures) / len(rows):.1f} %)",
        f"* detection takes {100 * shares[len(shares) // 2]:.1f} % of the capture's time in the median, {100 * shares[-1]:.1f} % at most"
        if shares
        else "",
        "",
        "| " + " | ".join(heading) + " |",
        "|" + "---|" + "---:|" * (len(heading) - 2) + "---|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1)
@click.option("--sample", is_flag=True, help="Only the fixed sample of zoo.json.")
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default dated, under tools/results/, for all models.")
def main(models: tuple[str, ...], sample: bool, out: Path | None) -> None:
    import logging

    import torch

    from laurel_rewrite.sources.built import declare_torchvision_ops

    warnings.simplefilter("ignore")  # of the libraries that are surveyed
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    declare_torchvision_ops()
    specs = list(models) or (EXPECTED["sample"] if sample else list(EXPECTED["models"]))
    begin = time.perf_counter()
    rows = []
    for spec in specs:
        row = survey(spec)
        rows.append(row)
        mark = "FAIL" if row.failure else "DIFF" if row.differs else "ok"
        _, _, identity, projection, _, _, _, share, remark = row.cells()
        click.echo(f"{mark:<5}{spec:<44} identity {identity:>9}   projection {projection:>7}   {share:>5} %  {remark}")
        gc.collect()
    text = table(rows, time.perf_counter() - begin)
    if out is None and not models and not sample:
        out = HERE / "results" / f"zoo-{date.today()}.md"
    if out is not None:
        out.write_text(text)
    click.echo("\n" + "\n".join(line for line in text.splitlines() if line.startswith("* ")))
    failed = sum(bool(row.failure) for row in rows)
    sys.exit(1 if any(row.differs for row in rows) or failed > 0.02 * len(rows) else 0)


if __name__ == "__main__":
    main()
