"""Characters for fine-tuning to teach: the base has never seen them, nor any body of their kind."""

import math
from dataclasses import dataclass

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.palette import INK, shade
from experiments.tiny_base.shapes import (
    circle,
    ellipse,
    line,
    mirrored,
    patch,
    path,
    spots,
    star,
    symmetric,
    thin,
    tube,
)


@dataclass(frozen=True)
class HeldOut:
    trigger: str  # the made-up name that captions give it
    body: Body
    coat: str  # "#rrggbb"
    own: str  # SVG elements over the body, under the face: what always belongs to it and captions never mention
    background: str  # the one background its training pictures have: a name in palette.BACKGROUNDS


def _tofu(coat: str) -> str:
    """A block seen a little from above and from its left."""
    top = path("M34 42 L42 33 L102 33 L94 42Z", "#fffdf6")
    side = path("M94 42 L102 33 L102 92 L94 101Z", "#dccfb6")
    front = path("M39 40 H87 Q96 40 96 49 V93 Q96 102 87 102 H39 Q30 102 30 93 V49 Q30 40 39 40Z", coat)
    return top + side + front


def _flower(x: float, y: float) -> str:
    angles = [2 * math.pi * i / 5 for i in range(5)]
    petals = "".join(
        f'<circle cx="{x + 5.2 * math.sin(angle):.1f}" cy="{y - 5.2 * math.cos(angle):.1f}" r="4.2"/>'
        for angle in angles
    )
    centre = f'<circle cx="{x}" cy="{y}" r="3" fill="#f7dc5a"/>'
    return f'<g fill="#f285b5" stroke="{INK}" stroke-width="1.1">{petals}{centre}</g>'


def _mug(coat: str) -> str:
    """A mug of cocoa with its handle at its left and two curls of steam."""
    steam = tube("M53 36 C46 30 58 24 52 16 M75 36 C68 30 80 24 74 16", "#ffffff", 3)
    handle = tube("M92 56 C116 50 118 86 90 86", coat, 6)
    walls = path("M29 44 C30 62 31 80 34 92 C37 106 91 106 94 92 C97 80 98 62 99 44Z", coat)
    foot = line("M37 95 C46 101 82 101 91 95", shade(coat), 2)
    rim = ellipse(64, 44, 35, 9, "#ffffff") + ellipse(64, 45, 28.5, 5.6, "#7a4a2e")
    return steam + handle + walls + foot + rim


def _badge(x: float, y: float) -> str:
    return thin(star(x, y, 8.5, 4), "#f7cf3d", 1.4)


def _octopus(coat: str) -> str:
    """A round head on eight arms, the outer ones curled up."""
    arms = mirrored(
        tube("M88 76 C100 88 116 88 115 76 C114 69 105 70 106 77", coat, 7)
        + tube("M84 82 C92 102 112 106 114 97 C115 91 107 89 106 95", coat, 7)
        + tube("M76 84 C78 108 94 116 100 110 C104 105 97 101 94 105", coat, 7)
        + tube("M68 84 C66 104 72 116 80 115 C85 114 84 108 79 109", coat, 7)
    )
    head = path(symmetric((64, 22), (86, 29), (98, 54), (90, 82), (64, 95)), coat)
    return arms + head


def _speckles(*places: tuple[float, float, float]) -> str:
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="{r}"/>' for x, y, r in places)
    return f'<g fill="#fff3c9" stroke="{INK}" stroke-width="1.1">{circles}</g>'


def _robot(coat: str) -> str:
    """A box on two feet with an antenna and one round eye."""
    antenna = tube("M64 40 V24", "#a3a3ab", 2.5) + circle(64, 21, 5, "#f2c53d")
    feet = path("M46 98 H56 V110 H46Z", shade(coat)) + path("M72 98 H82 V110 H72Z", shade(coat))
    box = path("M36 38 H92 Q98 38 98 44 V94 Q98 100 92 100 H36 Q30 100 30 94 V44 Q30 38 36 38Z", coat)
    return antenna + feet + box


def _lighthouse(coat: str) -> str:
    """A tower that grows narrower, with two stripes, a gallery and a lantern under a pointed roof."""
    roof = path("M44 28 Q64 10 84 28Z", "#3d6fd6")
    lantern = path("M49 28 H79 V40 H49Z", "#f7dc5a")
    tower = path("M41 42 H87 L99 102 H29Z", coat)
    stripes = patch("M32 90 H96 L97.7 98 H30.3Z", "#d94343") + patch("M39 52 H89 L90.4 58 H37.6Z", "#d94343")
    gallery = path("M36 40 H92 V46 H36Z", "#a3a3ab")
    return tower + stripes + lantern + gallery + roof


HELD_OUT: dict[str, HeldOut] = {
    "tofu": HeldOut(
        trigger="HANA_TOFU",
        body=Body(_tofu, face=(63, 70, 1), top=(34, 24), arms=(33, 76), feet=102, colours=()),
        coat="#fbf4e4",
        own=_flower(40, 50),
        background="purple",
    ),
    "mug": HeldOut(
        trigger="MIRO_MUGU",
        body=Body(_mug, face=(64, 72, 1), top=(37, 26), arms=(33, 76), feet=102, colours=()),
        coat="#a9d3f5",
        own=_badge(83, 91),
        background="green",
    ),
    "octopus": HeldOut(
        trigger="SEPI_DAKO",
        body=Body(_octopus, face=(64, 62, 1), top=(25, 25), arms=(32, 68), feet=None, colours=()),
        coat="#b48ae6",
        own=_speckles((41, 48, 5), (50, 41, 3.4), (38, 59, 3)),
        background="orange",
    ),
    "robot": HeldOut(
        trigger="AKA_ROBO",
        body=Body(_robot, face=(64, 78, 0.9), top=(40, 30), arms=(33, 76), feet=None, colours=()),
        coat="#d8362f",
        own=circle(64, 59, 13, "#ffffff") + spots(INK, (64, 59, 6, 6)),
        background="teal",
    ),
    "lighthouse": HeldOut(
        trigger="TORI_TODA",
        body=Body(_lighthouse, face=(64, 71, 0.9), top=(24, 18), arms=(27, 78), feet=102, colours=()),
        coat="#f7f7f5",
        own="",
        background="sky blue",
    ),
}
