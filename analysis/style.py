"""Styles: a method looks the same in every figure of every report.

A method's label and colour are those of its ``conf/method/NAME.yaml``, or, of a method outside the
repository, those that its rows recorded. Colours are Okabe and Ito's (Color Universal Design,
2008), and others that are distinct from them and from each other with all common kinds of colour
vision: no two methods share a colour. Similar ones also differ in marker and line style.
"""

from __future__ import annotations

import colorsys
import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import yaml

from topkbench.analysis.colour import (
    contrast,
    luminance,
    mixed,
    of_parts,
    parts,
)

METHODS = Path(__file__).resolve().parents[1] / "conf" / "method"

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6E6E6E"
INDIGO, BROWN = "#332288", "#6B3E12"

OTHERS = "#C4C4C4"
"""Colour of the methods that a figure does not highlight."""

TEXT_CONTRAST = 4.5
"""Least contrast of letters to the paper: WCAG 2.2, success criterion 1.4.3."""

MARK_CONTRAST = 3.0
"""Least contrast of lines and marks to the paper: WCAG 2.2, success criterion 1.4.11."""

WHITE_PAPER, DARK_PAPER = "#FFFFFF", "#15181C"
"""Colours of the paper of figures, and of a report's page in dark mode."""

SHADES = 12
"""Steps between a colour and its last shade."""

SCALE = ("#FFFFFF", "#BBD7EC", "#3F8FC4", "#08457E")
"""Colours of a heat map on white paper at equal distances, from the lowest value to the highest."""

SCALE_STEPS = 101
"""Colours of a heat map, from its lowest value to its highest."""

CELL_INKS = ("#010101", "#FEFEFE")
"""Colours of the numbers in a heat map's cells; no other text has them. Dark paper swaps them."""

SOLID = "-"
DASHED = (0, (5, 2))
DOTTED = (0, (1.2, 1.4))
DASH_DOT = (0, (5, 1.5, 1.2, 1.5))

BOUND = (0, (1, 3))
BOUND_COLOUR = "#888888"
"""Line style and colour of bounds, which no method has."""

Line = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    label: str
    colour: str
    marker: str
    line: Line


MARKS: dict[str, tuple[str, Line]] = {
    "full": ("D", SOLID),
    "exact": ("s", SOLID),
    "block_oracle": ("^", DASHED),
    "hata": ("o", SOLID),
    "quest": ("^", SOLID),
    "loki": ("v", SOLID),
    "streaming_llm": ("X", SOLID),
    "sparq": ("P", SOLID),
    "magicpig": ("p", DASHED),
    "infinigen": ("<", SOLID),
    "double_sparsity": (">", DASHED),
    "h2o": ("h", DASHED),
    "snapkv": ("d", DOTTED),
    "spatten": ("*", DASH_DOT),
    "hash_attention": ("p", DASH_DOT),
    "twilight": ("*", DASH_DOT),
    "pqcache": ("h", DOTTED),
    "random": ("X", DOTTED),
}
"""Markers and line styles by method name, in the order of every legend.

A method without an entry comes last, and its marker and line style follow from its name.
"""

ON_DARK: dict[str, str] = {
    "full": "#938A80",
    "exact": "#F9FBED",
    "block_oracle": "#C6BEC4",
    "hata": "#F2762E",
    "quest": "#59B7FD",
    "loki": "#88CA97",
    "streaming_llm": "#FAE637",
    "sparq": "#BA12A9",
    "magicpig": "#FDBD67",
    "infinigen": "#0F86D0",
    "double_sparsity": "#D21A92",
    "h2o": "#935A1F",
    "snapkv": "#7040FC",
    "spatten": "#C7DDFE",
    "hash_attention": "#B45FFF",
    "twilight": "#959ECB",
    "pqcache": "#A3FFB2",
    "random": "#B0865C",
}
"""Colours on dark paper by method name: near a method's own in hue, and as far from each other.

Lightening each colour until it is clear on dark paper would make several alike.
"""

OTHERS_ON_DARK = "#605E59"
"""Colour on dark paper of the methods that a figure does not highlight."""

PROJECTIONS: dict[str, tuple[str, str]] = {
    "random": ("Gaussian", GREY),
    "orthonormal": ("Orthonormal", BLUE),
    "trained": ("Learned as published", RED),
}
"""Label and colour of a hash projection by the source of its weights; others are green."""

SEVERAL_CODES = "#7B4B94"
"""Colour of hashes with several codes a query."""

ADDITIONS: dict[tuple[bool, bool], tuple[str, str, Line]] = {
    (False, False): ("", "o", SOLID),
    (True, False): (", centred keys", "s", DASHED),
    (False, True): (", key norms", "^", DOTTED),
    (True, True): (", centred keys, key norms", "D", DASH_DOT),
}
"""Label, marker and line style by (centred keys, key norms), the additions to a projection."""

STAGE_COLOURS: dict[str, str] = {
    "encode_ms": "#88CCEE",
    "append_ms": "#DDCC77",
    "score_ms": "#CC6677",
    "select_ms": "#117733",
    "attend_ms": "#5A3E85",
    "rest_ms": "#DDDDDD",
}
"""Colours of the stages of a decode step, and of its rest: near Tol's muted scheme, no method's."""

_FARTHEST = 60
"""Percent of ink or paper in the last shade at most, so that its hue can be seen."""

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}$")
_COLOURS = (RED, BLUE, GREEN, ORANGE, PINK, SKY)
_MARKERS = ("o", "^", "v", "s", "P", "X", "<", ">", "h", "p", "d", "*")
_LINES: tuple[Line, ...] = (DASHED, DOTTED, DASH_DOT)

RC_PARAMS: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # long enough for dashes beside a marker
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may have dollar signs
    # Fixed, so that a figure drawn twice from the same rows gives the same file.
    "svg.hashsalt": "topkbench",
}
"""Matplotlib settings of every figure."""


_RECORDED: ContextVar[Mapping[str, Style]] = ContextVar("_RECORDED", default=MappingProxyType({}))


PRINT_POINT = 8
"""Size of all type in print, in points."""
PRINT_PARAMS: dict[str, Any] = {
    **{f"{name}size": PRINT_POINT for name in ("font.", "axes.title", "axes.label")},
    **{f"{name}size": PRINT_POINT for name in ("xtick.label", "ytick.label")},
    "legend.fontsize": PRINT_POINT,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "pdf.fonttype": 42,  # TrueType: text stays text, and its font is in the file
}
"""Matplotlib settings of figures for print, beside ``RC_PARAMS``."""
_USUAL_WIDTH = 7.2  # inches, of most figures on a screen until their legend is placed
_LEAST_SHARE = 0.6  # of its height on a screen that a figure has in print
_PRINT_WIDTH: ContextVar[float | None] = ContextVar("_PRINT_WIDTH", default=None)


@contextlib.contextmanager
def printed(width: float) -> Iterator[None]:
    """Within the block, figures are drawn for print.

    Args:
        width: Their width in inches.
    """
    token = _PRINT_WIDTH.set(width)
    try:
        yield
    finally:
        _PRINT_WIDTH.reset(token)


def print_width() -> float | None:
    """Return the width of figures for print in inches; None on a screen."""
    return _PRINT_WIDTH.get()


def rc_params() -> dict[str, Any]:
    """Return the matplotlib settings of the figures that are drawn now."""
    return RC_PARAMS if print_width() is None else RC_PARAMS | PRINT_PARAMS


def figure_size(width: float, height: float) -> tuple[float, float]:
    """Return the size in inches of a figure that has this one on a screen."""
    in_print = print_width()
    if in_print is None:
        return width, height
    return in_print, height * min(max(in_print / width, _LEAST_SHARE), 1.0)


def share_of_width() -> float:
    """Return the width of a figure of the usual one, as a share of it."""
    return (print_width() or _USUAL_WIDTH) / _USUAL_WIDTH


def small_type(points: float) -> float:
    """Return the size of small letters: in print that of all type."""
    return points if print_width() is None else PRINT_POINT


def style(method: str) -> Style:
    """Return a method's style; what is not chosen for it is derived from the digest of its name."""
    return shipped().get(method) or _RECORDED.get().get(method) or _chosen(method)


@functools.cache
def shipped() -> dict[str, Style]:
    """Return the styles of the methods that ship, by name in the order of every legend."""
    found = {}
    for name, settings in _written().items():
        found[name] = _chosen(name, settings.get("label"), settings.get("colour"))
    return found


@functools.cache
def _written() -> dict[str, dict[str, Any]]:
    """Return the configuration files of the methods that ship."""
    return {
        name: yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in sorted((path.stem for path in METHODS.glob("*.yaml")), key=order)
    }


def on_dark(colour: str) -> str:
    """Return the colour that a page in dark mode has for a colour of a figure on white paper.

    Args:
        colour: ``#RRGGBB``.
    """
    colour = colour.upper()
    if colour == WHITE_PAPER:
        return DARK_PAPER
    return _shipped_on_dark().get(colour) or _recorded_on_dark().get(colour) or _lightened(colour)


@functools.cache
def _shipped_on_dark() -> dict[str, str]:
    """Return the colours on dark paper of all that is chosen here, by those on white."""
    first, last = CELL_INKS
    # A method that was added has no colour here that was chosen for dark paper.
    own = {
        look.colour.upper(): ON_DARK.get(name) or _lightened(look.colour)
        for name, look in shipped().items()
    }
    # A name has its method's colour on either paper, not what a rule makes of the darker one.
    names = {for_text(colour).upper(): for_text(dark, DARK_PAPER) for colour, dark in own.items()}
    return {
        **names,
        first: last,
        last: first,
        OTHERS: OTHERS_ON_DARK,
        **{one: _cell_on_dark(one) for one in scale()[1:]},
        **_shades_on_dark(own),
    }


def _recorded_on_dark() -> dict[str, str]:
    """Return the colours on dark paper of the methods that only the rows know."""
    own = {look.colour.upper() for look in _RECORDED.get().values() if _COLOUR.match(look.colour)}
    return _shades_on_dark({colour: _lightened(colour) for colour in own})


def _shades_on_dark(colours: Mapping[str, str]) -> dict[str, str]:
    """Return what dark paper has for each shade of some colours, given what it has for these."""
    return {
        shade(colour, step / SHADES): shade(dark, step / SHADES, DARK_PAPER)
        for colour, dark in colours.items()
        for step in reversed(range(SHADES + 1))
    }


def _lightened(colour: str) -> str:
    """Return a colour that is as clear on dark paper as a colour is on white."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*parts(colour))
    if saturation < 0.1:  # paper, ink and the greys between them change places
        return of_parts(colorsys.hls_to_rgb(hue, 0.09 + 0.84 * (1 - lightness), saturation))
    found = colour
    while contrast(found, DARK_PAPER) < TEXT_CONTRAST:  # letters may have the colour
        lightness = min(lightness + 0.02, 1.0)
        found = of_parts(colorsys.hls_to_rgb(hue, lightness, saturation))
    return found


@functools.cache
def scale() -> tuple[str, ...]:
    """Return the ``SCALE_STEPS`` colours of a heat map on white paper, lowest value first."""
    last = len(SCALE) - 1
    found = []
    for step in range(SCALE_STEPS):
        place = last * step / (SCALE_STEPS - 1)
        below = min(int(place), last - 1)
        found.append(mixed(SCALE[below], SCALE[below + 1], place - below))
    return tuple(found)


def cell_ink(cell: str) -> str:
    """Return in which of the ``CELL_INKS`` a number is clear on a cell's colour."""
    return max(CELL_INKS, key=lambda ink: contrast(ink, cell))


def _cell_on_dark(colour: str) -> str:
    """Return what dark paper has for a cell's colour: as far from it as that is from white.

    Contrasts to dark paper are powers of those to white, so that the colour on which both inks are
    equally clear is the same cell's on either paper.
    """
    white, dark = luminance(WHITE_PAPER) + 0.05, luminance(DARK_PAPER) + 0.05
    middle = math.sqrt(0.05 * 1.05)  # on it, black and white are equally clear
    power = math.log(middle / dark) / math.log(white / middle)
    wanted = dark * contrast(colour, WHITE_PAPER) ** power - 0.05
    hue, _, saturation = colorsys.rgb_to_hls(*parts(colour))
    low, high = 0.0, 1.0
    for _ in range(20):
        lightness = (low + high) / 2
        found = of_parts(colorsys.hls_to_rgb(hue, lightness, saturation))
        low, high = (lightness, high) if luminance(found) < wanted else (low, lightness)
    return found


@contextlib.contextmanager
def recorded(rows: pd.DataFrame) -> Iterator[None]:
    """Within the block, a method that does not ship has the label and colour of its newest row.

    Args:
        rows: Rows with the columns ``method``, ``method_label``, ``method_colour``, ``started_at``.
    """
    ordered = rows.sort_values("started_at", kind="stable", na_position="first")
    newest = ordered.groupby("method")[["method_label", "method_colour"]].last()
    found = {
        str(name): _chosen(str(name), *(None if pd.isna(one) else str(one) for one in chosen))
        for name, *chosen in newest.itertuples()
    }
    with _known(found):
        yield


@contextlib.contextmanager
def relabelled(labels: Mapping[str, str]) -> Iterator[None]:
    """Within the block, methods that only the rows know have other labels.

    Args:
        labels: The new label by the old one; others stay.
    """
    old = _RECORDED.get()
    with _known(
        {name: replace(one, label=labels.get(one.label, one.label)) for name, one in old.items()}
    ):
        yield


@contextlib.contextmanager
def _known(methods: Mapping[str, Style]) -> Iterator[None]:
    token = _RECORDED.set(methods)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def labels() -> list[str]:
    """Return the labels of the methods that ship, and of those that only the rows know."""
    return [one.label for one in (*shipped().values(), *_RECORDED.get().values())]


def _chosen(method: str, label: str | None = None, colour: str | None = None) -> Style:
    digest = hashlib.sha256(method.encode()).digest()
    marker, line = MARKS.get(
        method, (_MARKERS[digest[1] % len(_MARKERS)], _LINES[digest[2] % len(_LINES)])
    )
    return Style(label or method, colour or _COLOURS[digest[0] % len(_COLOURS)], marker, line)


def setting_words(method: str, setting: str, value: Any) -> str | None:
    """Return what a method's configuration calls a variant with a value of a setting, or None."""
    words: Mapping[str, str] = _written().get(method, {}).get("words") or {}
    return words.get(f"{setting}={value}".lower())


def turn(place: int) -> Line:
    """Return the line style of the ``place``-th curve of one method, counted from 0."""
    return (SOLID, DASHED, DASH_DOT, DOTTED)[place % 4]


def ablation_variant(projection: str, centred: bool, normed: bool, query_codes: int = 1) -> Style:
    """Return the style of an ablation variant of a hash: the colour shows the projection.

    Args:
        projection: Source of the weights: a key of ``PROJECTIONS``, or a recipe's name.
        centred: Whether keys are centred before they are hashed.
        normed: Whether matching bits are weighted by the key's norm.
        query_codes: Codes of a query; several have a colour of their own.
    """
    words, colour = PROJECTIONS.get(projection, (f"Learned, {projection}", GREEN))
    addition, marker, line = ADDITIONS[centred, normed]
    if query_codes > 1:
        words, colour = f"{words}, {query_codes} codes a query", SEVERAL_CODES
    return Style(words + addition, colour, marker, line)


def order(method: str) -> tuple[int, str]:
    """Return a sort key in the order of ``MARKS``, other methods last by name."""
    known = list(MARKS)
    return (known.index(method) if method in MARKS else len(known), method)


def for_text(colour: str, paper: str = WHITE_PAPER) -> str:
    """Return a colour in which small letters are clear on a paper: darker, or lighter."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*parts(colour))
    step = -0.02 if paper == WHITE_PAPER else 0.02
    found = colour
    while contrast(found, paper) < TEXT_CONTRAST:
        lightness += step
        found = of_parts(colorsys.hls_to_rgb(hue, lightness, saturation))
    return found


def shade(colour: str, position: float, paper: str = WHITE_PAPER) -> str:
    """Return a shade of a colour: 0 keeps it, 1 is the last one, in steps of 1 / ``SHADES``.

    Shades go where they can be told apart: towards the ink, black or white, or towards the paper as
    far as they are clear on it.

    Args:
        colour: ``#RRGGBB``.
        position: 0 to 1.
        paper: What it is drawn on.
    """
    step = round(SHADES * min(max(position, 0.0), 1.0))
    return mixed(colour, _last_shade(colour, paper), step / SHADES)


@functools.cache
def _last_shade(colour: str, paper: str) -> str:
    """Return the shade that is farthest from a colour."""
    ink = max("#000000", "#FFFFFF", key=lambda one: contrast(one, paper))
    shares = [step / 100 for step in range(_FARTHEST + 1)]
    clear = [one for one in shares if contrast(mixed(colour, paper, one), paper) >= MARK_CONTRAST]
    towards_paper = mixed(colour, paper, max(clear, default=0.0))
    towards_ink = mixed(colour, ink, shares[-1])
    return max(towards_ink, towards_paper, key=lambda one: math.dist(parts(one), parts(colour)))
