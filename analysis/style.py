"""The style table: a method looks the same in every figure of every report.

Colours are Okabe and Ito's (Color Universal Design, 2008), plus an indigo and a brown that are as
distinct from them with all common kinds of colour vision. No two methods share colour and marker;
those that share a colour also differ in line style.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6E6E6E"
INDIGO, BROWN = "#332288", "#6B3E12"

SOLID = "-"
DASHED = (0, (5, 2))
DOTTED = (0, (1.2, 1.4))
DASH_DOT = (0, (5, 1.5, 1.2, 1.5))

Line = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    label: str
    colour: str
    marker: str
    line: Line


STYLES: dict[str, Style] = {
    "full": Style("Full attention", GREY, "D", SOLID),
    "exact": Style("Exact top-k", BLACK, "s", SOLID),
    "block_oracle": Style("Exact pages", BLACK, "^", DASHED),
    "hata": Style("HATA", RED, "o", SOLID),
    "quest": Style("Quest", BLUE, "^", SOLID),
    "loki": Style("Loki", GREEN, "v", SOLID),
    "streaming_llm": Style("StreamingLLM", ORANGE, "X", SOLID),
    "sparq": Style("SparQ", PINK, "P", SOLID),
    "magicpig": Style("MagicPIG", ORANGE, "p", DASHED),
    "infinigen": Style("InfiniGen", SKY, "<", SOLID),
    "double_sparsity": Style("Double Sparsity", PINK, ">", DASHED),
    "h2o": Style("H2O", BROWN, "h", DASHED),
    "snapkv": Style("SnapKV", INDIGO, "d", DOTTED),
    "spatten": Style("SpAtten", SKY, "*", DASH_DOT),
    "hash_attention": Style("HashAttention", INDIGO, "p", DASH_DOT),
    "twilight": Style("Twilight", BLUE, "*", DASH_DOT),
    "pqcache": Style("PQCache", GREEN, "h", DOTTED),
    "random": Style("Random", GREY, "X", DOTTED),
}
"""Styles by method name, in the order of every legend."""

PROJECTIONS: dict[str, tuple[str, str]] = {
    "random": ("Gaussian", GREY),
    "orthonormal": ("Orthonormal", BLUE),
    "trained": ("Learned as published", RED),
}
"""Label and colour of a hash projection by the source of its weights; others are green."""

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
    "attend_ms": "#332288",
}
"""Colours of the stages of a decode step (Tol's muted scheme), distinct from the methods'."""

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
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    # Fixed, so that a figure drawn twice from the same rows gives the same file.
    "svg.hashsalt": "topkbench",
}
"""Matplotlib settings of every figure."""


def style(method: str) -> Style:
    """Return a method's style; that of an unknown name is derived from the digest of the name."""
    if method in STYLES:
        return STYLES[method]
    digest = hashlib.sha256(method.encode()).digest()
    return Style(
        method,
        _COLOURS[digest[0] % len(_COLOURS)],
        _MARKERS[digest[1] % len(_MARKERS)],
        _LINES[digest[2] % len(_LINES)],
    )


def turn(place: int) -> Line:
    """Return the line style of the ``place``-th curve of one method, counted from 0."""
    return (SOLID, DASHED, DASH_DOT, DOTTED)[place % 4]


def ablation_variant(projection: str, centred: bool, normed: bool) -> Style:
    """Return the style of an ablation variant of a hash: the colour shows the projection.

    Args:
        projection: Source of the weights: a key of ``PROJECTIONS``, or a recipe's name.
        centred: Whether keys are centred before they are hashed.
        normed: Whether matching bits are weighted by the key's norm.
    """
    words, colour = PROJECTIONS.get(projection, (f"Learned, {projection}", GREEN))
    addition, marker, line = ADDITIONS[centred, normed]
    return Style(words + addition, colour, marker, line)


def order(method: str) -> tuple[int, str]:
    """Return a sort key in the order of ``STYLES``, unknown methods last by name."""
    known = list(STYLES)
    return (known.index(method) if method in STYLES else len(known), method)


def shade(colour: str, position: float) -> str:
    """Return a lighter colour: 0 keeps it, 1 is the lightest that is still readable on white."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    share = 0.5 * min(max(position, 0.0), 1.0)
    mixed = (round(part + (255 - part) * share) for part in (red, green, blue))
    return "#" + "".join(f"{part:02X}" for part in mixed)
