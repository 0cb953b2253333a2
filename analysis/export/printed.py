"""Figures for print: PDF of a given width, all type of 8 points, which stays text."""

from __future__ import annotations

import dataclasses
import functools
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from topkbench.analysis import style
from topkbench.analysis.figures.curves import lay_out
from topkbench.analysis.figures.plots import Drawn, draw_all
from topkbench.analysis.record.files import write_atomic

WIDTHS = (3.3, 7.0)
"""Widths in inches: of one of two columns, and of a page."""
_NARROWEST = 1.1
"""Least width of axes in inches, without what is written beside them."""
_ACROSS, _UPWARDS = 11.0, 9.0
"""Characters of a label for each inch of the figure's width, and of its height."""
_NARROW = 5.0
"""Width in inches below which names below columns stand upright."""
_TOUCHING = 0.02
"""How far texts may overlap, in inches: their boxes are a little larger than the letters."""


@dataclasses.dataclass(frozen=True)
class Printed:
    """What was drawn for print.

    Attributes:
        files: The files.
        captions: What each shows, by file: a title and how to read it.
        left_out: Names of figures, with the width in which their type does not fit.
    """

    files: list[Path]
    captions: dict[Path, str]
    left_out: list[str]


def draw(
    configurations: pd.DataFrame,
    folder: Path,
    context: str,
    suffix: str,
    samples: pd.DataFrame,
    methods: Sequence[str] | None,
) -> Printed:
    """Draw every figure that the configurations of one setting allow, in each width.

    A figure whose type does not fit in a width is left out there, not shrunk.

    Args:
        configurations: As of `draw_all`, and so are the others.
        folder: Folder of the files.
        context: What was measured.
        suffix: Suffix of the files' names.
        samples: The samples behind the configurations.
        methods: Methods to highlight.
    """
    found = Printed([], {}, [])
    for width in WIDTHS:
        write = functools.partial(_write, found, width)
        with style.printed(width):
            draw_all(
                configurations, folder, context, suffix, samples=samples, methods=methods,
                write=write,
            )  # fmt: skip
    return found


def _write(found: Printed, width: float, figure: Figure, data: pd.DataFrame, drawn: Drawn) -> Drawn:
    """Write a figure as PDF without its title, which the caption has; unless it does not fit."""
    place = drawn.folder / f"{drawn.name}-{width:g}in.pdf"
    figure.axes[0].set_title("")
    if figure.get_suptitle():
        figure.suptitle("")
    for text in figure.findobj(Text):
        text.set_fontsize(style.PRINT_POINT)
    _fold_labels(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        renderer = lay_out(figure)
        figure.draw_without_rendering()  # which puts a legend's lines in their places
    if not _fits(figure, renderer):
        found.left_out.append(f"{drawn.name} at {width:g} inches")
        return drawn
    # Of the paper's whole width, and as high as what is drawn.
    drawn_box = figure.get_tightbbox(renderer)
    box = Bbox([[0, drawn_box.y0 - 0.03], [width, drawn_box.y1 + 0.03]])
    file = io.BytesIO()
    FigureCanvasPdf(figure)
    none = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    figure.savefig(file, format="pdf", bbox_inches=box, metadata=none)
    write_atomic(place, file.getvalue())
    found.files.append(place)
    found.captions[place] = f"{drawn.title}. {drawn.caption}"
    return drawn


def _fold_labels(figure: Figure) -> None:
    """Fold the labels of axes into lines that fit; names below narrow columns stand upright."""
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        if "\n" not in axes.get_xlabel():
            axes.set_xlabel(textwrap.fill(axes.get_xlabel(), int(_ACROSS * width)))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), int(_UPWARDS * height)))
        names = [one.get_text() for one in axes.get_xticklabels()]
        if width < _NARROW and any("\n" in one for one in names):
            upright = [one.replace("\n", " ") for one in names]
            axes.set_xticks(axes.get_xticks(), upright, rotation=90, fontsize=style.PRINT_POINT)


def _fits(figure: Figure, renderer: RendererAgg) -> bool:
    """Return whether all axes are wide enough, and all text is on the paper and apart."""
    width, _ = figure.get_size_inches()
    inch = figure.dpi
    if any(one.get_window_extent().width < _NARROWEST * inch for one in figure.axes[:1]):
        return False
    boxes = np.array([one.get_window_extent(renderer).extents for one in _texts(figure)]) / inch
    if not len(boxes):
        return True
    if boxes[:, 0].min() < -_TOUCHING or boxes[:, 2].max() > width + _TOUCHING:
        return False
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    over = (high - low > _TOUCHING).all(axis=2)
    return int(over.sum()) == len(boxes)  # each overlaps itself alone


def _texts(figure: Figure) -> list[Text]:
    """Return the texts of a figure that are seen; ticks outside the axes' limits are not."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            near = 1e-6 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - near <= tick.get_loc() <= high + near:
                    hidden |= {tick.label1, tick.label2}
    found = (one for one in figure.findobj(Text) if isinstance(one, Text))
    return [
        one for one in found if one.get_visible() and one.get_text().strip() and one not in hidden
    ]
