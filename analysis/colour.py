"""Colours as ``#RRGGBB``: their parts, and how clear they are on one another."""

from __future__ import annotations

from collections.abc import Iterable


def parts(colour: str) -> tuple[float, float, float]:
    """Return red, green and blue, 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def of_parts(found: Iterable[float]) -> str:
    """Return the colour of red, green and blue, 0 to 1."""
    return "#" + "".join(f"{round(255 * one):02X}" for one in found)


def mixed(colour: str, other: str, share: float) -> str:
    """Return a colour with a share, 0 to 1, of another mixed into it."""
    both = zip(parts(colour), parts(other), strict=True)
    return of_parts(one + (two - one) * share for one, two in both)


def luminance(colour: str) -> float:
    """Return a colour's relative luminance, 0 to 1: WCAG 2.2."""
    red, green, blue = (
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts(colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21: WCAG 2.2."""
    darker, lighter = sorted((luminance(first), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
