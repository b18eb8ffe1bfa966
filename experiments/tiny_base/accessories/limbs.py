"""Legs, and arms with their hands and sleeves."""

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.shapes import Box, Point, circle, line, tube

# Where an arm's hand and elbow are, in pixels outwards and downwards of the shoulder: (hand x, y, elbow x, y). The
# elbow is the control point of a quadratic curve, so the arm bends half as far as it says.
Arm = tuple[float, float, float, float]

HAND = 4.3  # radii in pixels
OPEN_HAND = 6.2
LEG = 9  # height of the legs
FOOT = 6  # length of a foot

LIMB_WIDTH = 3.2
SLEEVE_WIDTH = 6.6  # within its outline


def legs(body: Body, spread: float) -> str:
    """Two legs, their feet `spread` to either side of the middle; none for a body without feet."""
    if body.feet is None:
        return ""
    elements = ""
    for outwards in (-1, 1):
        foot, sole = 64 + outwards * spread, body.feet + LEG
        d = f"M{64 + outwards * 11} {body.feet - 3} L{foot:.1f} {sole} L{foot + outwards * FOOT:.1f} {sole}"
        elements += line(d, width=LIMB_WIDTH)
    return elements


def legs_box(body: Body, spread: float) -> Box:
    """Around the legs of a body that has feet."""
    reach = spread + FOOT
    return 64 - reach, body.feet, 64 + reach, body.feet + LEG


def limb(body: Body, outwards: int, arm: Arm, radius: float, skin: str, sleeve: str | None) -> str:
    """An arm with a hand of that radius: `outwards` is -1 for its right arm, 1 for its left one. A shirt's short
    sleeve, of that colour, covers its beginning."""
    (x0, y0), (x1, y1), (x2, y2) = _curve(body, outwards, arm)
    elements = line(f"M{x0:.1f} {y0:.1f} Q{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}", width=LIMB_WIDTH)
    if sleeve:
        # The first third of the curve: its control point is a third of the way to the whole one's.
        bend = f"{(2 * x0 + x1) / 3:.1f} {(2 * y0 + y1) / 3:.1f}"
        end = f"{(4 * x0 + 4 * x1 + x2) / 9:.1f} {(4 * y0 + 4 * y1 + y2) / 9:.1f}"
        elements += tube(f"M{x0:.1f} {y0:.1f} Q{bend} {end}", sleeve, SLEEVE_WIDTH)
    return elements + circle(round(x2, 1), round(y2, 1), radius, skin)


def limb_box(body: Body, outwards: int, arm: Arm, radius: float) -> Box:
    """Around the hand and the middle of the arm, where it bends."""
    (x0, y0), (x1, y1), (x2, y2) = _curve(body, outwards, arm)
    bend_x, bend_y, half = (x0 + 2 * x1 + x2) / 4, (y0 + 2 * y1 + y2) / 4, SLEEVE_WIDTH / 2 + 1
    return (
        min(x2 - radius, bend_x - half),
        min(y2 - radius, bend_y - half),
        max(x2 + radius, bend_x + half),
        max(y2 + radius, bend_y + half),
    )


def _curve(body: Body, outwards: int, arm: Arm) -> list[Point]:
    """Shoulder, elbow and hand: the points of the arm's quadratic curve."""
    half_width, y = body.arms
    x = 64 + outwards * (half_width - 2)
    hand_x, hand_y, elbow_x, elbow_y = arm
    return [(x, y), (x + outwards * elbow_x, y + elbow_y), (x + outwards * hand_x, y + hand_y)]
