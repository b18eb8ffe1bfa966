"""SVG elements with the one outline that bodies and accessories share, in a 128 x 128 picture."""

import math

from experiments.tiny_base.palette import INK

OUTLINE = f'stroke="{INK}" stroke-width="2.2" stroke-linejoin="round" stroke-linecap="round"'

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def document(elements: str, view: tuple[float, float, float] = (0, 0, 128), outline: float | None = None) -> str:
    """An SVG document of a square view (left, top, width) on elements; `outline` is the width in pixels that shared
    outlines get instead of their own."""
    left, top, width = view
    style = f'<style>[stroke-width="2.2"] {{ stroke-width: {outline:.2f}px }}</style>' if outline else ""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {width}">{style}{elements}</svg>'


def path(d: str, fill: str) -> str:
    return f'<path d="{d}" fill="{fill}" {OUTLINE}/>'


def circle(x: float, y: float, r: float, fill: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}" {OUTLINE}/>'


def ellipse(x: float, y: float, rx: float, ry: float, fill: str) -> str:
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{fill}" {OUTLINE}/>'


def thin(d: str, fill: str, width: float) -> str:
    """A path with a thinner outline."""
    return f'<path d="{d}" fill="{fill}" stroke="{INK}" stroke-width="{width}" stroke-linejoin="round"/>'


def patch(d: str, fill: str) -> str:
    """A path without an outline."""
    return f'<path d="{d}" fill="{fill}"/>'


def spots(fill: str, *places: tuple[float, float, float, float]) -> str:
    """Ellipses (x, y, rx, ry) without an outline."""
    ellipses = (f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}"/>' for x, y, rx, ry in places)
    return f'<g fill="{fill}">{"".join(ellipses)}</g>'


def line(d: str, colour: str = INK, width: float = 2.2) -> str:
    return (
        f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width}"'
        ' stroke-linejoin="round" stroke-linecap="round"/>'
    )


def tube(d: str, fill: str, width: float) -> str:
    """A line of that inner width with an outline around it."""
    return line(d, width=width + 4.4) + line(d, fill, width)


def placed(elements: str, x: float, y: float, scale: float) -> str:
    """Elements drawn about (0, 0), scaled and moved to (x, y)."""
    return f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.2f})">{elements}</g>'


def mirrored(elements: str) -> str:
    """The elements and their reflection in the picture's middle, x = 64."""
    return f'{elements}<g transform="matrix(-1 0 0 1 128 0)">{elements}</g>'


def smooth(points: list[Point]) -> str:
    """Path data of the closed Catmull-Rom curve through the points."""
    count = len(points)
    d = "M{:.1f} {:.1f}".format(*points[0])
    for i in range(count):
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (points[(i + step) % count] for step in (-1, 0, 1, 2))
        d += f" C{x1 + (x2 - x0) / 6:.1f} {y1 + (y2 - y0) / 6:.1f}"
        d += f" {x2 - (x3 - x1) / 6:.1f} {y2 - (y3 - y1) / 6:.1f} {x2:.1f} {y2:.1f}"
    return d + "Z"


def symmetric(*right: Point) -> str:
    """Path data of a smooth closed curve, given the points of its right half from top to bottom."""
    left = [(128 - x, y) for x, y in reversed(right) if x != 64]
    return smooth([*right, *left])


def star(x: float, y: float, outer: float, inner: float, rays: int = 5) -> str:
    """Path data of a star with one ray straight up."""
    corners = []
    for i in range(2 * rays):
        radius, angle = (inner if i % 2 else outer), math.pi * i / rays
        corners.append(f"{x + radius * math.sin(angle):.1f} {y - radius * math.cos(angle):.1f}")
    return "M" + " L".join(corners) + "Z"


def heart(x: float, y: float, r: float) -> str:
    """Path data of a heart that is 2 r wide."""
    return (
        f"M{x:.1f} {y + 0.95 * r:.1f} C{x - 0.5 * r:.1f} {y + 0.6 * r:.1f} {x - r:.1f} {y + 0.2 * r:.1f} "
        f"{x - r:.1f} {y - 0.35 * r:.1f} C{x - r:.1f} {y - 1.05 * r:.1f} {x - 0.2 * r:.1f} {y - 1.1 * r:.1f} "
        f"{x:.1f} {y - 0.45 * r:.1f} C{x + 0.2 * r:.1f} {y - 1.1 * r:.1f} {x + r:.1f} {y - 1.05 * r:.1f} "
        f"{x + r:.1f} {y - 0.35 * r:.1f} C{x + r:.1f} {y + 0.2 * r:.1f} {x + 0.5 * r:.1f} {y + 0.6 * r:.1f} "
        f"{x:.1f} {y + 0.95 * r:.1f}Z"
    )


def ring(x: float, y: float, radius: float, r: float, count: int, fill: str) -> str:
    """`count` circles of radius r, their centres on a circle around (x, y), the first straight above it."""
    angles = (2 * math.pi * i / count for i in range(count))
    return "".join(
        circle(round(x + radius * math.sin(angle), 1), round(y - radius * math.cos(angle), 1), r, fill)
        for angle in angles
    )
