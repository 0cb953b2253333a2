"""Methods look the same everywhere and are distinguishable with any common colour vision."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from topkbench.analysis import style
from topkbench.analysis.report import page

METHODS = Path(__file__).parents[2] / "conf" / "method"
# Simulated colour vision in linear RGB: Machado, Oliveira and Fernandes, "A Physiologically-based
# Model for Simulation of Color Vision Deficiency" (2009), the matrices of severity 1.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]]
    ),
    "deuteranopia": np.array(
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]
    ),
    "tritanopia": np.array(
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(1)


def lab(colour: str, vision: str) -> np.ndarray:
    """Return a colour's CIE 1976 L*, a*, b* under a kind of colour vision."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ (VISIONS[vision] @ linear).clip(0, 1) / WHITE
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def test_a_method_looks_the_same_everywhere() -> None:
    assert style.style("my_method") == style.style("my_method")
    assert style.style("my_method").label == "my_method"


def test_every_method_that_ships_has_its_label_and_colour() -> None:
    styles = style.shipped()
    assert set(styles) == {path.stem for path in METHODS.glob("*.yaml")}
    assert [name for name, look in styles.items() if look.label == name] == []
    assert list(styles)[:3] == ["full", "exact", "block_oracle"]  # the references come first
    hata = style.Style("HATA", "#D55E00", "o", style.SOLID)
    assert style.style("hata") == styles["hata"] == hata
    for name in style.MARKS:  # no marks are left of a method that is gone
        assert name in styles


def test_a_method_that_does_not_ship_looks_as_its_newest_row_says() -> None:
    rows = pd.DataFrame(
        [
            ("toy", "Old", "#000000", "2026-01-01"),
            ("toy", "Toy keys", "#123456", "2026-02-01"),
            ("bare", None, None, "2026-01-01"),
            ("hata", "Another", "#123456", "2026-01-01"),
        ],
        columns=["method", "method_label", "method_colour", "started_at"],
    )
    before = {name: style.style(name) for name in ("toy", "bare", "hata")}
    with style.recorded(rows):
        toy = style.style("toy")
        assert (toy.label, toy.colour) == ("Toy keys", "#123456")
        assert (toy.marker, toy.line) == (before["toy"].marker, before["toy"].line)
        assert style.style("bare") == before["bare"]
        assert style.style("hata") == before["hata"]  # its configuration says how it looks
    assert style.style("toy") == before["toy"]


def colours() -> dict[str, str]:
    """Return the colours of the methods that have one, and of those that are not highlighted."""
    # A method may leave its colour to its name: its author sees what it then looks like.
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in METHODS.glob("*.yaml")}
    found = {name: one["colour"] for name, one in settings.items() if one.get("colour")}
    assert len(found) >= 18
    return {**found, "others": style.OTHERS}


@pytest.mark.parametrize("paper", ["white", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_no_two_methods_have_colours_that_can_be_confused(vision: str, paper: str) -> None:
    """Whichever methods a figure highlights together, and beside the grey of the others.

    12 is about five of the differences of CIE 1976 that are just noticeable (2.3: Mahy, van Eycken
    and Oosterlinck, 1994), as lines and markers are thin and lie apart.
    """
    drawn = colours()
    if paper == "dark":
        # A method of one's own has the general rule's colour, which may be near another's.
        chosen = {*style.ON_DARK, "others"}
        drawn = {name: on_dark_paper(one) for name, one in drawn.items() if name in chosen}
        assert len(drawn) >= 19
    for (first, one), (second, other) in itertools.combinations(drawn.items(), 2):
        apart = np.linalg.norm(lab(one, vision) - lab(other, vision))
        assert apart > 12, (first, second, apart)


@pytest.mark.parametrize("vision", VISIONS)
def test_stages_of_a_step_are_told_apart_and_are_no_method(vision: str) -> None:
    stages = style.STAGE_COLOURS
    assert not {one.upper() for one in stages.values()} & {
        one.upper() for one in colours().values()
    }
    for drawn in (stages, {name: on_dark_paper(one.lower()) for name, one in stages.items()}):
        for (first, one), (second, other) in itertools.combinations(drawn.items(), 2):
            apart = np.linalg.norm(lab(one, vision) - lab(other, vision))
            assert apart > 12, (first, second, apart)


def on_dark_paper(colour: str) -> str:
    """Return what a page in dark mode draws where its figure's file has a colour."""
    found = re.fullmatch("light-dark\\((#......), (#......)\\)", page._on_both(colour))
    assert found is not None
    assert found[1] == colour.lower()
    return found[2]


def test_every_colour_is_clear_on_dark_paper_and_keeps_its_hue() -> None:
    """Three to one, as WCAG 2.2 asks of lines and marks (criterion 1.4.11); hues within 20 degrees.

    The grey of methods that are not highlighted is fainter on both papers.
    """
    for name, colour in colours().items():
        dark = on_dark_paper(colour)
        assert contrast(dark, dark_paper()) > (2.5 if name == "others" else 3), name
        (_, *before), (_, *after) = lab(colour, "normal"), lab(dark, "normal")
        if np.hypot(*before) < 12:  # a grey
            assert np.hypot(*after) < 12, name
            continue
        turn = np.degrees(np.arctan2(*after[::-1]) - np.arctan2(*before[::-1]))
        assert abs((turn + 180) % 360 - 180) < 20, (name, turn)


def contrast(colour: str, paper: str) -> float:
    """Return the contrast of two colours: WCAG 2.2."""

    def luminance(one: str) -> float:
        parts = np.array([int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ TO_XYZ[1])

    lighter, darker = sorted((luminance(colour), luminance(paper)))[::-1]
    return (lighter + 0.05) / (darker + 0.05)


def dark_paper() -> str:
    stylesheet = Path(page.__file__).with_name("report.css").read_text()
    found = re.search(r"--paper: light-dark\(#ffffff, (#\w+)\)", stylesheet)
    assert found is not None
    assert found[1] == style.DARK_PAPER.lower()
    return found[1]


def test_shades_of_hash_bits_and_budgets_are_told_apart_and_clear_on_either_paper() -> None:
    """Of up to five, as many as a sweep has budgets: the neighbours, whose dashes also differ.

    4.6 is twice the just noticeable difference. A colour that is itself fainter than three to one
    on white, as the markers of some methods are, has no shade that is fainter still.
    """
    for name, colour in [*colours().items(), ("models", "#222222")]:
        if name == "others":
            continue
        shades = [style.shade(colour, place / 4) for place in range(5)]
        assert shades[0] == colour.upper()
        for paper, drawn in (
            ("#ffffff", shades),
            (dark_paper(), [on_dark_paper(one.lower()) for one in shades]),
        ):
            least = min(3, contrast(drawn[0], paper))
            assert min(contrast(one, paper) for one in drawn) > least - 0.01, (name, paper)
            for vision in VISIONS:
                for one, other in itertools.pairwise(drawn):
                    apart = np.linalg.norm(lab(one, vision) - lab(other, vision))
                    assert apart > 4.6, (name, paper, vision, apart)


def test_shades_of_a_method_that_only_rows_know_are_told_apart_on_dark_paper() -> None:
    columns = ["method", "method_label", "method_colour", "started_at"]
    rows = pd.DataFrame([("toy", "Toy", "#1A2B6C", "2026-01-01")], columns=columns)
    with style.recorded(rows):
        dark = [on_dark_paper(style.shade("#1A2B6C", place / 4).lower()) for place in range(5)]
    for one, other in itertools.pairwise(dark):
        assert np.linalg.norm(lab(one, "normal") - lab(other, "normal")) > 4.6


def test_cells_of_a_heat_map_have_clear_numbers_and_an_order_on_either_paper() -> None:
    cells = style.scale()
    assert len(cells) == 101  # one for each point of a score
    assert (cells[0], cells[100]) == ("#FFFFFF", "#08457E")
    inks = [style.cell_ink(one) for one in cells]
    assert page._on_both(cells[0]) == "var(--paper)"
    on_dark = [dark_paper(), *(on_dark_paper(one.lower()) for one in cells[1:])]
    for paper, drawn, written in (
        ("#ffffff", cells, inks),
        (dark_paper(), on_dark, [on_dark_paper(one.lower()) for one in inks]),
    ):
        for cell, ink in zip(drawn, written, strict=True):
            assert contrast(cell, ink) > 4.5, (cell, ink)
        away = [contrast(one, paper) for one in drawn]
        assert all(one < other for one, other in itertools.pairwise(away[::5]))
        for vision in VISIONS:
            for one, other in itertools.pairwise(drawn[::10]):
                assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 2.3


def test_names_are_written_in_colours_that_are_clear_on_white() -> None:
    for name, colour in colours().items():
        assert contrast(style.for_text(colour), "#ffffff") >= 4.5, name
        dark = style.ON_DARK.get(name)
        if dark is not None and style.for_text(colour) != colour:
            # On dark paper it is the mark's colour, lighter if need be.
            assert style.on_dark(style.for_text(colour)) == style.for_text(
                dark, style.DARK_PAPER
            ), name
            assert contrast(style.for_text(dark, style.DARK_PAPER), style.DARK_PAPER) >= 4.5, name
    assert style.for_text("#0072B2") == "#0072B2"  # clear as it is


@pytest.mark.parametrize("vision", VISIONS)
def test_methods_differ_in_marker_or_in_a_distinguishable_colour(vision: str) -> None:
    for first, second in itertools.combinations(style.shipped().values(), 2):
        apart = np.linalg.norm(lab(first.colour, vision) - lab(second.colour, vision))
        assert first.marker != second.marker or apart > 20, (first.label, second.label)
        assert first.line != second.line or apart > 10, (first.label, second.label)
