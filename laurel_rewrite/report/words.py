"""Names and numbers as the terminal and the page show them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

_INPUTS = 5  # shown of a graph; the JSON has them all
_SHOWN = 120  # characters of a name on the page; the JSON has them all


def shortened(text: object, length: int = _SHOWN) -> str:
    """A name with its middle left out where it is too long to show."""
    text = str(text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2) :]}"


def sizes_of(shape: Mapping[str, str]) -> str:
    """Inputs and their sizes; of many, as a decoder with a past has them, the first ones and the number of the others."""
    shown = [f"{shortened(name, 40)} {value}" for name, value in shape.items()]
    return ", ".join(shown if len(shown) <= _INPUTS else [*shown[: _INPUTS - 1], f"and {len(shown) - _INPUTS + 1} more"])


def places(shapes: Sequence[Mapping[str, str]], phases: Sequence[str]) -> list[str]:
    """What was measured at each shape: a phase of a decoder, the sizes of inputs, or both where one alone does not tell."""
    told = len(set(phases)) == len(phases)
    return [phase if phase and told else f"{phase} {sizes_of(shape)}".lstrip() for shape, phase in zip(shapes, phases, strict=True)]


def breakable(text: object, length: int = 60) -> Markup:
    """A shortened name that a page may break behind its dots, slashes and colons, and nowhere else."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[./:])", shortened(text, length)))


def size(number: float) -> str:
    """Bytes in words."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= one:
            return f"{number / one:.1f} {unit}"
    return f"{number:.0f} B" if number else "-"


def count(number: float) -> str:
    """A number in words: 8.2 G."""
    for unit, one in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= one:
            return f"{number / one:.2f} {unit}"
    return f"{number:.0f}"


def numbered(count: int, noun: str) -> str:
    """ "1 site", "2 sites"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def figure(number: float, form: str) -> str:
    """A figure in its form: see `laurel_rewrite.profiling.figures.Figure`."""
    if form in ("ms", "number"):
        return f"{number:.0f}"
    return size(number) if form == "size" else count(number)


def skipped_of(skipped: int, rewritten: int) -> str:
    """How many of the planned sites kept their plain sum, in words."""
    return f"{skipped} of {skipped + rewritten} sites skipped: they keep their plain sum."


def settings(site: Mapping[str, Any]) -> str:
    """The options of a plan's site in words; of LAuReL, whose others are seldom changed, the rank and what is changed."""
    from laurel_rewrite.operators.registry import operators

    known = operators().get(site["variant"])
    options = known.options if known is not None else {}
    given = {name: site[name] for name in options if name in site}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in given.items() if name == "rank" or value != options[name].default
    )
