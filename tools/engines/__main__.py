"""Run every cell of the table and write it: `python -m tools.engines`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import closing

from tools.engines.case import CLASSES
from tools.engines.ranks import Ranks
from tools.engines.table import PAGE, WrongError, cell, engines, written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.engines", description=__doc__)
    parser.add_argument("--engine", nargs="+", choices=list(engines()), help="only these; then nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cells, wrong = {}, 0
    with closing(Ranks()) as pool:
        for name, engine in engines().items():
            if options.engine and name not in options.engine:
                continue
            for operator in CLASSES:
                start = time.monotonic()
                try:
                    cells[name, operator] = cell(engine, operator, pool)
                except WrongError as error:
                    wrong += 1
                    cells[name, operator] = f"WRONG: {error}"
                print(f"{name:<40} {operator:<15} {time.monotonic() - start:5.1f} s  {cells[name, operator]}", flush=True)
    if not wrong and not options.engine:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(written(cells))
        print(f"{PAGE} is written.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
