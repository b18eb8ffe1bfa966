"""The kinds of characters the tiny base learns: what each looks like, and where a face, a hat and limbs go on it.

There are many, unlike in shape, so that the model learns that any body can wear anything. None is box-shaped, and
none is one of held_out.HELD_OUT: those are for fine-tuning to teach.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from experiments.tiny_base.palette import INK, shade
from experiments.tiny_base.shapes import (
    Point,
    circle,
    ellipse,
    line,
    mirrored,
    patch,
    path,
    ring,
    smooth,
    spots,
    star,
    symmetric,
    tube,
)


@dataclass(frozen=True)
class Body:
    """One kind of character, drawn in a 128 x 128 picture in a neutral pose."""

    paint: Callable[[str], str]  # colour "#rrggbb" -> SVG elements
    face: tuple[float, float, float]  # centre x, y and scale; at scale 1 a face is 40 wide and 34 high
    top: tuple[float, float]  # y of the head's top and half of its width there, where hats and hair sit
    arms: tuple[float, float]  # half of the body's width where the arms are joined, and its y
    feet: float | None  # y of the body's edge at x = 64 - 11 and 64 + 11, where legs are joined; None: no legs
    colours: tuple[str, ...]  # names in palette.COATS it is drawn in


LEAF = "#5aa845"
WOOD = "#8a5f3c"
CREAM = "#f6ead2"
WHITE = "#ffffff"
BLUSH = "#f2a0b5"
BEAK = "#ef8636"
GOLD = "#f7dc7a"
CHARCOAL = "#4a4552"

# Ink eyes and mouths do not show on black: a body comes in black only where its face is of another colour.
ANY = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white", "teal", "brown", "gray")
FUR = ("brown", "white", "gray", "orange", "pink", "blue")

# Noses and beaks lie between the eyes and the mouth: 1 to 9 below the face's centre at scale 1.
# Ruff would give each anchor a line of its own.
# fmt: off
BODIES: dict[str, Body] = {
    # Fruit and vegetables
    "apple": Body(
        lambda c: path("M64 38 C50 28 28 36 28 64 C28 92 48 104 64 99 C80 104 100 92 100 64 C100 36 78 28 64 38Z", c)
        + line("M64 38 C64 30 67 26 70 22") + path("M68 31 C76 22 86 24 88 28 C82 34 74 35 68 31Z", LEAF),
        face=(64, 67, 1), top=(36, 26), arms=(35, 70), feet=101, colours=("red", "green", "yellow")),
    "orange": Body(
        lambda c: circle(64, 68, 35, c) + path("M64 33 C72 22 84 24 88 29 C82 38 70 38 64 33Z", LEAF)
        + spots(shade(c, 0.85), (38, 62, 1.4, 1.4), (36, 76, 1.4, 1.4), (46, 90, 1.4, 1.4), (56, 97, 1.4, 1.4),
                (88, 54, 1.4, 1.4), (92, 68, 1.4, 1.4), (84, 88, 1.4, 1.4)),
        face=(64, 67, 1), top=(34, 26), arms=(35, 70), feet=101, colours=("orange",)),
    "lemon": Body(
        lambda c: path("M20 70 C26 66 28 62 32 56 C40 42 52 35 64 35 C76 35 88 42 96 56 C100 62 102 66 108 70 "
                       "C102 74 100 78 96 84 C88 96 76 102 64 102 C52 102 40 96 32 84 C28 78 26 74 20 70Z", c),
        face=(64, 68, 1), top=(36, 24), arms=(38, 76), feet=100, colours=("yellow", "green")),
    "pear": Body(
        lambda c: path("M64 28 C50 28 50 44 46 54 C34 64 30 76 34 88 C40 102 54 104 64 104 C74 104 88 102 94 88 "
                       "C98 76 94 64 82 54 C78 44 78 28 64 28Z", c)
        + line("M64 28 C64 22 66 18 70 15"),
        face=(64, 76, 1), top=(30, 15), arms=(31, 80), feet=103, colours=("green", "yellow", "red")),
    "strawberry": Body(
        lambda c: path(symmetric((64, 36), (82, 34), (99, 48), (97, 68), (86, 88), (74, 100), (64, 103)), c)
        + mirrored(spots(GOLD, (92, 62, 1.5, 2.4), (86, 78, 1.5, 2.4), (76, 91, 1.5, 2.4), (70, 48, 1.5, 2.4)))
        + spots(GOLD, (64, 96, 1.5, 2.4))
        + path("M64 45 L55 38 L50 48 L46 38 L33 44 L42 33 Q64 22 86 33 L95 44 L82 38 L78 48 L73 38Z", LEAF),
        face=(64, 69, 0.95), top=(31, 22), arms=(33, 70), feet=99, colours=("red", "pink", "white")),
    "pineapple": Body(
        lambda c: path("M64 42 L46 34 L53 32 L44 21 L57 27 L64 12 L71 27 L84 21 L75 32 L82 34Z", LEAF)
        + ellipse(64, 71, 32, 34, c)
        + line("M35 62 L50 44 M33 78 L42 66 M36 90 L42 80 M44 99 L57 84 M93 62 L78 44 M95 78 L86 66 M92 90 L86 80 "
               "M84 99 L71 84 M34 62 L58 101 M94 62 L70 101 M42 49 L47 56 M86 49 L81 56", shade(c, 0.8), 1.8),
        face=(64, 68, 0.95), top=(37, 20), arms=(32, 74), feet=103, colours=("yellow", "orange", "green")),
    "carrot": Body(
        lambda c: path("M64 38 C52 36 46 26 48 16 C54 18 58 22 60 26 C60 20 62 14 64 10 C66 14 68 20 68 26 "
                       "C70 22 74 18 80 16 C82 26 76 36 64 38Z", LEAF)
        + path(symmetric((64, 35), (82, 35), (95, 46), (93, 64), (84, 86), (75, 101), (64, 106)), c)
        + line("M35 54 L44 54 M93 64 L86 64 M43 84 L52 84 M81 92 L73 92", shade(c), 2),
        face=(64, 62, 1), top=(36, 24), arms=(29, 68), feet=102, colours=("orange", "yellow", "purple", "white")),
    "avocado": Body(
        lambda c: path(symmetric((64, 25), (80, 30), (90, 50), (100, 76), (90, 98), (64, 105)), c)
        + patch(symmetric((64, 31), (76, 35), (84, 52), (93, 76), (85, 93), (64, 99)), "#e9efb4")
        + circle(64, 88, 10, WOOD),
        face=(64, 60, 0.9), top=(28, 17), arms=(34, 70), feet=104, colours=("green", "brown", "purple")),
    "onion": Body(
        lambda c: path("M64 104 C42 104 26 94 26 74 C26 52 54 46 60 34 C61 30 60 24 58 18 L64 22 L71 17 "
                       "C68 24 67 30 68 34 C74 46 102 52 102 74 C102 94 86 104 64 104Z", c)
        + line("M57 44 C42 54 34 64 34 80 M71 44 C86 54 94 64 94 80 M62 40 C60 46 57 50 53 53 M66 40 "
               "C68 46 71 50 75 53", shade(c), 1.8),
        face=(64, 74, 1), top=(33, 13), arms=(37, 80), feet=103, colours=("purple", "white", "yellow", "red", "brown")),
    "tomato": Body(
        lambda c: path("M64 41 C52 34 24 36 24 68 C24 92 44 102 64 102 C84 102 104 92 104 68 C104 36 76 34 64 41Z", c)
        + path("M61 38 L62 28 L68 28 L67 38 L86 36 L75 43 L80 53 L66 45 L52 54 L54 44 L42 38Z", LEAF),
        face=(64, 71, 1), top=(38, 26), arms=(39, 74), feet=101, colours=("red", "yellow", "orange", "green")),
    "pumpkin": Body(
        lambda c: path("M60 40 C60 32 56 28 54 25 L64 22 C66 28 68 32 70 40Z", LEAF)
        + path("M64 39 C54 33 44 35 40 40 C26 42 22 58 22 70 C22 86 28 98 42 99 C48 104 58 104 64 101 "
               "C70 104 80 104 86 99 C100 98 106 86 106 70 C106 58 102 42 88 40 C84 35 74 33 64 39Z", c)
        + mirrored(line("M43 43 C34 52 34 88 44 96 M58 42 C54 46 53 48 52 51 M54 92 L57 98", shade(c), 2)),
        face=(64, 69, 1), top=(38, 26), arms=(41, 74), feet=101, colours=("orange", "white", "green", "yellow")),
    "eggplant": Body(
        lambda c: path(symmetric((64, 34), (80, 38), (89, 56), (98, 78), (89, 98), (64, 105)), c)
        + path("M61 33 L60 22 L68 20 L68 33 C80 34 88 42 90 54 L78 46 L72 56 L64 46 L56 56 L50 46 L38 54 "
               "C40 42 48 34 61 33Z", LEAF),
        face=(64, 75, 0.95), top=(32, 18), arms=(33, 82), feet=103, colours=("purple", "white", "pink")),
    "radish": Body(
        lambda c: path("M64 42 C44 40 38 22 46 12 C56 14 62 24 64 30 C66 24 72 14 82 12 C90 22 84 40 64 42Z", LEAF)
        + path("M64 38 C42 36 28 50 28 68 C28 88 50 94 57 101 C60 104 62 106 62 112 C66 110 68 104 71 101 "
               "C78 94 100 88 100 68 C100 50 86 36 64 38Z", c)
        + patch("M46 92 C54 97 56 101 60.5 105 L67 104 C70 100 75 96 82 92 C70 95 58 95 46 92Z", CREAM),
        face=(64, 66, 1), top=(38, 24), arms=(35, 70), feet=98, colours=("red", "pink", "purple", "white")),
    "corn": Body(
        lambda c: path(symmetric((64, 23), (80, 30), (90, 50), (91, 72), (84, 94), (64, 104)), c)
        + line("M52 32 L76 32 M46 41 L82 41 M42 50 L48 50 M86 50 L80 50 M40 60 L44 60 M88 60 L84 60 M58 26 L57 42 "
               "M70 26 L71 42", shade(c, 0.82), 1.8)
        + mirrored(path("M100 56 C106 78 96 102 68 105 C70 100 76 98 80 88 C86 78 90 66 100 56Z", LEAF)),
        face=(64, 64, 0.95), top=(27, 17), arms=(35, 78), feet=103, colours=("yellow", "white", "purple")),
    "cherry": Body(
        lambda c: line("M62 44 C60 30 66 18 80 12") + path("M72 16 C80 6 96 8 102 16 C94 24 80 24 72 16Z", LEAF)
        + path("M64 45 C52 35 28 42 28 70 C28 92 46 103 64 103 C82 103 100 92 100 70 C100 42 76 35 64 45Z", c)
        + patch("M36 66 C36 56 40 50 46 48 C42 54 40 60 40 67Z", WHITE),
        face=(64, 71, 1), top=(41, 25), arms=(35, 76), feet=101, colours=("red", "pink", "purple")),
    "watermelon": Body(
        lambda c: path("M20 48 L108 48 C108 80 90 101 64 101 C38 101 20 80 20 48Z", LEAF)
        + patch("M26 49.5 L102 49.5 C102 76 86 94 64 94 C42 94 26 76 26 49.5Z", CREAM)
        + patch("M30 49.5 L98 49.5 C98 74 84 90 64 90 C44 90 30 74 30 49.5Z", c)
        + mirrored(spots(INK, (92, 58, 1.5, 2.4), (84, 74, 1.5, 2.4), (73, 84, 1.5, 2.4))) + line("M20 48 L108 48"),
        face=(64, 66, 0.9), top=(47, 28), arms=(38, 74), feet=100, colours=("red", "yellow", "pink", "orange")),
    "kiwi": Body(
        lambda c: ellipse(64, 68, 38, 35, "#9a6b3f") + spots(c, (64, 68, 33, 30)) + spots("#f3f4cf", (64, 68, 25, 21))
        + spots(INK, *((round(64 + 29 * math.cos(a), 1), round(68 + 25.5 * math.sin(a), 1), 1.3, 1.3)
                       for a in (i * math.pi / 8 for i in range(16)))),
        face=(64, 67, 0.9), top=(34, 26), arms=(37, 74), feet=101, colours=("green", "yellow", "red")),
    "potato": Body(
        lambda c: path("M44 34 C62 24 84 32 90 48 C94 60 106 70 101 86 C95 104 72 105 58 102 C36 99 22 84 28 62 "
                       "C31 50 34 40 44 34Z", c)
        + line("M40 52 L44 48 M92 70 L95 73 M42 88 L47 91 M82 96 L87 93", shade(c), 2),
        face=(64, 68, 1), top=(31, 24), arms=(35, 74), feet=102, colours=("brown", "yellow", "purple")),
    "mushroom": Body(
        lambda c: path("M42 56 C44 76 37 90 37 96 C40 107 88 107 91 96 C91 90 84 76 86 56Z", CREAM)
        + path("M22 58 C22 32 44 22 64 22 C84 22 106 32 106 58 C92 63 36 63 22 58Z", c)
        + spots(WHITE, (41, 45, 7, 6), (65, 34, 7, 6), (88, 46, 6, 6)),
        face=(64, 79, 0.85), top=(26, 24), arms=(24, 86), feet=104,
        colours=("red", "brown", "purple", "blue", "orange", "black")),
    # Other food
    "egg": Body(
        lambda c: path("M64 28 C44 28 32 56 32 72 C32 92 46 104 64 104 C82 104 96 92 96 72 C96 56 84 28 64 28Z", c),
        face=(64, 70, 1), top=(31, 18), arms=(32, 76), feet=102, colours=("white", "brown", "blue", "pink")),
    "acorn": Body(
        lambda c: path("M34 56 C34 84 48 96 58 102 L64 107 L70 102 C80 96 94 84 94 56Z", c)
        + path("M61 32 C61 26 59 24 58 20 L67 19 C66 24 67 26 68 32 C90 34 100 46 100 58 C80 64 48 64 28 58 "
               "C28 46 38 34 61 32Z", shade(c, 0.66))
        + line("M42 44 L46 48 M54 40 L58 44 M68 44 L72 40 M82 48 L86 44 M48 54 L52 57 M62 54 L66 57 M78 57 L82 54",
               shade(c, 0.5), 1.6),
        face=(64, 76, 0.85), top=(33, 24), arms=(26, 80), feet=100, colours=("brown", "orange", "yellow", "green")),
    "peanut": Body(
        lambda c: path(symmetric((64, 22), (80, 25), (89, 38), (84, 54), (96, 74), (91, 96), (64, 105)), c)
        + mirrored(line("M74 32 L77 36 M72 42 L75 44 M90 80 L88 84 M80 96 L77 98", shade(c), 2))
        + line("M62 29 L66 29", shade(c), 2),
        face=(64, 73, 0.95), top=(25, 18), arms=(32, 80), feet=104, colours=("yellow", "brown", "orange")),
    "dumpling": Body(
        lambda c: path("M64 42 C58 40 54 34 56 30 C60 27 68 27 72 30 C74 34 70 40 64 42Z", c)
        + path("M64 38 C54 38 46 44 40 50 C28 58 22 68 22 80 C22 96 42 102 64 102 C86 102 106 96 106 80 "
               "C106 68 100 58 88 50 C82 44 74 38 64 38Z", c)
        + line("M64 39 L64 50 M57 40 C54 44 52 48 50 53 M71 40 C74 44 76 48 78 53 M49 45 C44 49 40 54 37 60 M79 45 "
               "C84 49 88 54 91 60", shade(c), 2),
        face=(64, 75, 1), top=(32, 18), arms=(41, 78), feet=101,
        colours=("white", "yellow", "green", "pink", "orange")),
    "rice ball": Body(
        lambda c: path(symmetric((64, 28), (78, 36), (95, 66), (103, 88), (93, 101), (64, 102)), c)
        + path("M46 102 L46 94 C56 91 72 91 82 94 L82 102 Q64 103.5 46 102Z", CHARCOAL)
        + spots(shade(c, 0.85), (56, 40, 2, 1), (71, 46, 2, 1), (40, 78, 1, 2), (92, 82, 1, 2), (36, 92, 2, 1)),
        face=(64, 70, 0.95), top=(32, 18), arms=(35, 74), feet=102, colours=("white", "pink", "yellow", "brown")),
    "cookie": Body(
        lambda c: path("M92 43 C102 52 103 84 84 97 C64 110 32 100 28 74 C24 48 48 30 68 33 C68 40 73 44 78 43 "
                       "C80 49 87 50 92 43Z", c)
        + mirrored(spots("#4d3020", (91, 72, 3.4, 3), (82, 92, 3, 2.6)))
        + spots("#4d3020", (46, 44, 3, 2.6), (64, 97, 3.2, 2.6), (60, 39, 2.6, 2.2)),
        face=(64, 69, 1), top=(34, 24), arms=(34, 76), feet=102, colours=("brown", "orange", "yellow", "pink")),
    "donut": Body(
        lambda c: circle(64, 67, 37, "#dfae72")
        + path("M64 33 C84 33 98 47 98 65 C98 71 95 73 92 78 C90 84 86 82 82 87 C78 92 72 88 66 92 C60 97 54 90 48 90 "
               "C42 90 42 83 37 80 C31 76 30 71 30 65 C30 47 44 33 64 33Z", c)
        + ellipse(64, 46, 8, 6, "#b98345")
        + line("M40 52 L43 48 M48 40 L52 38 M84 44 L87 48 M91 60 L92 64 M36 66 L38 70 M76 37 L80 39", WHITE, 2.4),
        face=(64, 69, 0.95), top=(31, 26), arms=(36, 76), feet=102,
        colours=("pink", "brown", "white", "purple", "blue", "green", "yellow")),
    "ice cream": Body(
        lambda c: path("M38 72 L54 102 Q64 107 74 102 L90 72Z", "#e0a860")
        + line("M48 88 L66 76 M53 98 L80 80 M80 88 L62 76 M75 98 L48 80", "#b97f3e", 1.8)
        + path("M64 24 C86 24 98 42 97 62 C98 72 92 78 87 76 C83 84 77 84 74 79 C71 88 63 88 60 80 C56 86 50 86 47 79 "
               "C42 84 37 80 36 74 C30 72 30 66 31 60 C30 42 42 24 64 24Z", c),
        face=(64, 55, 1), top=(26, 24), arms=(33, 60), feet=101,
        colours=("pink", "white", "brown", "green", "blue", "purple", "yellow", "orange")),
    "cupcake": Body(
        lambda c: path("M34 60 L42 100 Q64 106 86 100 L94 60Z", "#e8b878")
        + line("M45 84 L48 101 M83 84 L80 101 M39 68 L41 76 M89 68 L87 76", "#b98345", 1.8)
        + path("M30 61 C26 49 38 43 42 43 C42 31 54 26 64 20 C74 26 86 31 86 43 C90 43 102 49 98 61 "
               "C86 65 42 65 30 61Z", c),
        face=(64, 77, 0.9), top=(24, 14), arms=(25, 84), feet=103,
        colours=("pink", "brown", "white", "purple", "blue", "yellow", "black")),
    # Animals
    "cat": Body(
        lambda c: mirrored(path("M94 56 L97 24 L74 40Z", c) + patch("M91 46 L93 32 L82 40Z", BLUSH))
        + ellipse(64, 68, 36, 34, c) + patch("M64 74 L60.5 70 L67.5 70Z", BLUSH)
        + mirrored(line("M106 72 L92 73 M105 81 L91 79", width=1.8)),
        face=(64, 67, 1), top=(35, 24), arms=(34, 82), feet=101,
        colours=("gray", "orange", "white", "brown", "pink", "blue", "yellow")),
    "dog": Body(
        lambda c: ellipse(64, 68, 35, 34, c) + spots(CREAM, (64, 82, 19, 14)) + spots(INK, (64, 72, 4, 2.8))
        + mirrored(path("M82 37 C98 32 110 46 107 72 C104 80 96 80 94 72 C93 60 90 48 82 37Z", shade(c, 0.66))),
        face=(64, 67, 1), top=(35, 20), arms=(33, 82), feet=101,
        colours=("brown", "yellow", "white", "gray", "orange")),
    "bear": Body(
        lambda c: mirrored(circle(91, 41, 12, c) + spots(shade(c), (91, 41, 6, 6))) + ellipse(64, 68, 36, 34, c)
        + spots(CREAM, (64, 80, 16, 12)) + spots(INK, (64, 71, 3.6, 2.4)),
        face=(64, 67, 1), top=(35, 24), arms=(35, 76), feet=101, colours=FUR),
    "panda": Body(
        lambda c: mirrored(circle(91, 40, 12, CHARCOAL)) + ellipse(64, 68, 38, 34, c)
        # Grey rather than black, or its eyes would not show.
        + mirrored('<ellipse cx="77" cy="63" rx="9.5" ry="11.5" transform="rotate(-24 77 63)" fill="#a09ca8"/>')
        + spots(INK, (64, 71, 3.4, 2.4)),
        face=(64, 66, 1), top=(35, 24), arms=(37, 76), feet=101, colours=("white", "pink", "yellow", "blue")),
    "koala": Body(
        lambda c: mirrored(circle(95, 48, 17, c) + spots(CREAM, (96, 50, 10, 10))) + ellipse(64, 70, 35, 32, c)
        + spots(CHARCOAL, (64, 69, 4.6, 6.4)),
        face=(64, 69, 1), top=(39, 24), arms=(34, 80), feet=101, colours=("gray", "brown", "blue", "purple", "pink")),
    "mouse": Body(
        lambda c: mirrored(circle(93, 40, 17, c) + spots(BLUSH, (93, 40, 11, 11))) + ellipse(64, 72, 33, 31, c)
        + spots(BLUSH, (64, 75, 3.2, 2.6)) + mirrored(line("M106 76 L90 77 M104 85 L89 83", width=1.6)),
        face=(64, 71, 1), top=(42, 22), arms=(32, 84), feet=102, colours=("gray", "white", "brown", "pink", "blue")),
    "rabbit": Body(
        lambda c: mirrored(ellipse(79, 32, 9.5, 22, c) + spots(BLUSH, (79, 32, 4.5, 15))) + ellipse(64, 72, 34, 32, c)
        + spots(BLUSH, (64, 75, 3.2, 2.4)),
        face=(64, 71, 1), top=(40, 22), arms=(33, 80), feet=103, colours=("white", "brown", "gray", "pink", "purple")),
    "fox": Body(
        lambda c: mirrored(path("M78 44 L99 17 L103 62Z", c) + patch("M91 42 L97 28 L99 49Z", CHARCOAL))
        + path("M64 38 C80 38 94 46 98 62 C100 70 104 75 110 80 C98 94 80 102 64 102 C48 102 30 94 18 80 "
               "C24 75 28 70 30 62 C34 46 48 38 64 38Z", c)
        + mirrored(patch("M64 80 C78 82 92 74 99 69 C101 74 104 77 108 80 C97 93 80 101 63.5 101Z", CREAM))
        + spots(INK, (64, 72, 3.6, 2.6)),
        face=(64, 67, 1), top=(38, 24), arms=(38, 84), feet=101, colours=("orange", "red", "white", "gray", "brown")),
    "lion": Body(
        lambda c: ring(64, 67, 30, 11, 12, "#b0602e") + mirrored(circle(86, 43, 8, c)) + circle(64, 68, 29, c)
        + spots(CREAM, (64, 81, 14, 10)) + patch("M64 76 L59.5 71 L68.5 71Z", INK),
        face=(64, 68, 0.95), top=(32, 26), arms=(39, 74), feet=103, colours=("yellow", "orange", "white", "pink")),
    "monkey": Body(
        lambda c: mirrored(circle(98, 64, 12, c) + spots("#f0cfa8", (99, 64, 7, 7))) + ellipse(64, 66, 35, 35, c)
        + patch("M64 52 C72 42 92 48 91 64 C90 70 88 72 88 78 C88 92 76 97 64 97 C52 97 40 92 40 78 "
                "C40 72 38 70 37 64 C36 48 56 42 64 52Z", "#f0cfa8")
        + spots(WOOD, (61.6, 71, 1.2, 1.6), (66.4, 71, 1.2, 1.6)),
        face=(64, 68, 1), top=(32, 24), arms=(33, 82), feet=100, colours=("brown", "gray", "orange", "black")),
    "pig": Body(
        lambda c: mirrored(path("M94 54 L97 30 L75 41Z", shade(c, 0.85))) + ellipse(64, 68, 37, 34, c)
        + ellipse(64, 71, 8, 5, "#f2a0b5") + spots(INK, (61, 71, 1.4, 1.7), (67, 71, 1.4, 1.7)),
        face=(64, 67, 1), top=(35, 24), arms=(36, 76), feet=101, colours=("pink", "gray", "white", "brown")),
    "sheep": Body(
        lambda c: ring(64, 66, 29, 12, 11, c)
        + mirrored(path("M84 66 C94 60 104 62 107 68 C102 76 90 76 84 72Z", CREAM))
        + path("M64 50 C78 46 90 54 89 70 C88 88 78 97 64 97 C50 97 40 88 39 70 C38 54 50 46 64 50Z", CREAM)
        + spots(c, (54, 47, 8, 7), (64, 45, 9, 8), (74, 47, 8, 7)) + spots(BLUSH, (64, 74.5, 3, 2)),
        face=(64, 70, 0.95), top=(27, 24), arms=(37, 80), feet=104,
        colours=("white", "gray", "black", "brown", "pink")),
    "hedgehog": Body(
        lambda c: path(star(64, 66, 45, 35, 19), c)
        + path("M64 56 C72 46 94 52 93 74 C92 92 80 102 64 102 C48 102 36 92 35 74 C34 52 56 46 64 56Z", CREAM)
        + spots(INK, (64, 77, 3.4, 2.6)),
        face=(64, 73, 1), top=(29, 24), arms=(37, 82), feet=102, colours=("brown", "gray", "purple", "blue", "black")),
    "frog": Body(
        lambda c: mirrored(circle(84, 42, 13, c) + spots(WHITE, (84, 40, 7, 7)) + spots(INK, (84, 40, 3, 3)))
        + path(symmetric((64, 45), (88, 49), (103, 70), (95, 94), (64, 103)), c) + spots("#f3f0b8", (64, 96, 20, 5)),
        face=(64, 71, 1), top=(44, 22), arms=(39, 78), feet=102, colours=("green", "teal", "blue", "yellow", "red")),
    "turtle": Body(
        lambda c: path("M64 26 C92 26 106 48 106 72 C106 84 100 92 88 94 L40 94 C28 92 22 84 22 72 "
                       "C22 48 36 26 64 26Z", c)
        + line("M50 29 L54 42 L74 42 L78 29 M54 42 L42 54 L26 56 M74 42 L86 54 L102 56 M92 74 L105 76 M36 74 L23 76",
               shade(c, 0.66), 2.4)
        + path(symmetric((64, 47), (84, 53), (93, 74), (84, 96), (64, 103)), "#c4dd86"),
        face=(64, 73, 1), top=(28, 24), arms=(38, 84), feet=102,
        colours=("green", "brown", "teal", "orange", "purple", "blue", "red")),
    "dinosaur": Body(
        lambda c: path("M64 34 L54 14 L45 34 L33 22 L33 46 L18 44 L27 62 L17 70 L34 78Z", GOLD)
        + path("M64 34 L74 14 L83 34 L95 22 L95 46 L110 44 L101 62 L111 70 L94 78Z", GOLD)
        + path(symmetric((64, 29), (86, 36), (98, 60), (99, 84), (86, 100), (64, 103)), c)
        + spots(CREAM, (64, 93, 22, 9)),
        face=(64, 66, 1), top=(30, 24), arms=(35, 84), feet=102,
        colours=("green", "blue", "purple", "teal", "red", "pink")),
    "bat": Body(
        lambda c: mirrored(path("M84 62 C94 44 106 42 118 42 C114 50 116 58 119 64 C112 62 108 66 107 72 "
                                "C102 70 97 72 95 78Z", shade(c, 0.75)) + path("M92 54 L93 20 L71 38Z", c))
        + ellipse(64, 68, 33, 34, c) + mirrored(patch("M66 84.5 L71 84 L69 88.5Z", WHITE)),
        face=(64, 66, 1), top=(35, 22), arms=(31, 82), feet=101, colours=("purple", "gray", "brown", "blue", "red")),
    "penguin": Body(
        lambda c: path(symmetric((64, 28), (86, 36), (97, 60), (97, 84), (86, 100), (64, 104)), c)
        + patch("M64 52 C70 40 90 44 91 62 C92 66 90 70 89 74 C93 90 82 101 64 101 C46 101 35 90 39 74 "
                "C38 70 36 66 37 62 C38 44 58 40 64 52Z", WHITE)
        + path("M59 69 Q64 66 69 69 L64 74Z", BEAK),
        face=(64, 65, 1), top=(29, 22), arms=(34, 78), feet=103,
        colours=("black", "blue", "gray", "purple", "teal", "red")),
    "owl": Body(
        lambda c: path("M36 19 C44 30 54 32 64 32 C74 32 84 30 92 19 C92 32 95 40 99 50 C108 76 92 104 64 104 "
                       "C36 104 20 76 29 50 C33 40 36 32 36 19Z", c)
        + mirrored(circle(78, 58, 16, CREAM))
        + line("M36 88 q4 5 8 0 M84 88 q4 5 8 0 M46 95 q4 5 8 0 M60 97 q4 5 8 0 M74 95 q4 5 8 0", shade(c, 0.66), 2)
        + path("M60 63 Q64 60 68 63 L64 70Z", BEAK),
        face=(64, 62, 1), top=(32, 24), arms=(37, 76), feet=102,
        colours=("brown", "gray", "white", "blue", "purple", "orange")),
    "chick": Body(
        lambda c: tube("M64 36 C58 28 60 22 65 18 M64 36 C66 29 71 26 76 26", c, 2.6)
        + path("M28 70 L22 62 L32 58 C36 42 48 34 64 34 C80 34 92 42 96 58 L106 62 L100 70 C100 90 84 102 64 102 "
               "C44 102 28 90 28 70Z", c)
        + path("M58 70 Q64 66 70 70 L64 75.5Z", BEAK),
        face=(64, 67, 1), top=(34, 24), arms=(34, 78), feet=101, colours=("yellow", "white", "blue", "pink", "brown")),
    "fish": Body(
        lambda c: path("M52 40 C56 28 66 20 80 20 C78 28 80 34 82 42Z", shade(c))
        + path("M92 58 L116 36 C112 48 112 54 118 62 L96 78Z", shade(c)) + ellipse(64, 68, 37, 32, c)
        + spots(CREAM, (64, 91, 20, 7)) + mirrored(line("M93 72 q-4 3 0 7 M87 80 q-4 3 0 7 ", shade(c), 2)),
        face=(64, 66, 1), top=(36, 25), arms=(36, 74), feet=99,
        colours=("orange", "blue", "red", "yellow", "teal", "purple", "gray", "pink")),
    "whale": Body(
        lambda c: tube("M64 42 C64 30 58 24 50 27 M64 42 C64 30 70 24 78 27", "#bfe6fa", 3)
        + path("M90 72 C104 70 106 60 104 52 C98 50 94 46 95 40 C102 40 107 43 109 47 C111 43 115 41 121 42 "
               "C121 49 117 53 112 54 C116 72 108 88 92 92Z", c)
        + path(symmetric((64, 40), (88, 46), (101, 68), (96, 90), (64, 102)), c)
        + patch("M30 83 C44 90 84 90 98 83 C94 96 80 101 64 101 C48 101 34 96 30 83Z", CREAM)
        + line("M48 91 L48 97 M58 92 L58 99 M70 92 L70 99 M80 91 L80 97", "#cdbb98", 1.8),
        face=(64, 66, 0.95), top=(40, 25), arms=(36, 78), feet=100, colours=("blue", "teal", "gray", "purple", "pink")),
    "jellyfish": Body(
        lambda c: tube("M40 78 C32 88 46 94 38 105 M52 80 C46 92 58 98 51 110 M64 80 C58 92 70 98 64 112 M76 80 "
                       "C82 92 70 98 77 110 M88 78 C96 88 82 94 90 105", shade(c), 2.6)
        + path("M26 74 C24 44 40 26 64 26 C88 26 104 44 102 74 C98 84 90 84 86 78 C82 86 74 86 71 79 "
               "C68 86 60 86 57 79 C54 86 46 86 42 78 C38 84 30 84 26 74Z", c),
        face=(64, 58, 1), top=(28, 26), arms=(38, 66), feet=None,
        colours=("pink", "purple", "blue", "teal", "white", "orange")),
    "bee": Body(
        lambda c: mirrored(ellipse(98, 48, 15, 11, "#dff1fa") + line("M72 38 C74 28 78 24 84 22")
                           + circle(85, 21, 3.4, CHARCOAL))
        + ellipse(64, 69, 34, 33, c)
        + patch("M33 82 Q64 98 95 82 C94 86 92 88 90 91 Q64 104 38 91 C36 88 34 86 33 82Z", CHARCOAL)
        + patch("M43 44 Q64 54 85 44 Q81 41 77 39 Q64 45 51 39 Q47 41 43 44Z", CHARCOAL)
        + ellipse(64, 69, 34, 33, "none"),
        face=(64, 66, 1), top=(36, 23), arms=(34, 72), feet=101, colours=("yellow", "orange", "pink", "blue", "white")),
    "ladybug": Body(
        lambda c: mirrored(line("M74 34 C76 26 80 22 86 20")) + circle(64, 68, 36, c)
        + patch("M36 46 C44 28 84 28 92 46 Q64 54 36 46Z", CHARCOAL)
        + mirrored(spots(CHARCOAL, (94, 60, 4, 5.5), (91, 78, 5, 6), (80, 95, 5, 4.5)))
        + line("M64 92 L64 103", CHARCOAL) + circle(64, 68, 36, "none"),
        face=(64, 68, 1), top=(33, 24), arms=(35, 72), feet=102,
        colours=("red", "orange", "yellow", "pink", "blue", "green")),
    # Plants, sky and earth
    "flower": Body(
        lambda c: ring(64, 66, 27, 14, 8, c) + circle(64, 66, 26, GOLD),
        face=(64, 66, 0.85), top=(28, 20), arms=(39, 74), feet=104, colours=(*ANY, "black")),
    "cactus": Body(
        lambda c: mirrored(path("M86 62 C96 62 94 48 100 46 C108 46 108 56 105 64 C102 74 94 78 86 78Z", c))
        + path(symmetric((64, 24), (82, 32), (91, 54), (91, 80), (82, 100), (64, 104)), c)
        + line("M50 34 C46 38 44 42 42 48 M78 34 C82 38 84 42 86 48 M64 29 L64 44 M44 86 L48 96 M84 86 L80 96 M64 93 "
               "L64 99", shade(c), 2)
        + mirrored(circle(70, 25, 4.5, BLUSH)) + circle(64, 21, 5, "#f285b5"),
        face=(64, 66, 0.95), top=(26, 19), arms=(27, 84), feet=103, colours=("green", "teal", "yellow")),
    "leaf": Body(
        lambda c: line("M64 96 L64 108", shade(c, 0.6), 4)
        + path("M64 18 C70 32 82 34 92 42 C90 48 94 56 102 62 C98 68 98 76 100 84 C88 86 80 100 64 102 "
               "C48 100 40 86 28 84 C30 76 30 68 26 62 C34 56 38 48 36 42 C46 34 58 32 64 18Z", c)
        + line("M64 28 L64 50 M64 44 L76 36 M64 44 L52 36 M64 90 L64 101 M64 96 L84 84 M64 96 L44 84 M86 68 L97 63 "
               "M42 68 L31 63", shade(c), 2),
        face=(64, 67, 0.95), top=(30, 18), arms=(34, 74), feet=98,
        colours=("green", "red", "orange", "yellow", "brown")),
    "tree": Body(
        lambda c: path("M52 80 C52 92 50 98 46 104 Q64 107 82 104 C78 98 76 92 76 80Z", WOOD)
        + path("M64 22 C76 20 84 26 86 34 C98 36 102 46 100 53 C108 62 104 76 94 80 C90 88 78 90 72 86 "
               "C68 90 60 90 56 86 C50 90 38 88 34 80 C24 76 20 62 28 53 C26 46 30 36 42 34 C44 26 52 20 64 22Z", c)
        + line("M40 46 q4 -5 8 -3 M82 44 q6 -1 7 5 M34 70 q4 5 9 3 M86 74 q6 1 8 -4", shade(c), 2),
        face=(64, 60, 1), top=(24, 23), arms=(38, 70), feet=105,
        colours=("green", "pink", "orange", "red", "yellow", "teal")),
    "star": Body(
        lambda c: path(star(64, 68, 46, 27), c),
        face=(64, 68, 0.85), top=(32, 12), arms=(30, 66), feet=99, colours=ANY),
    "sun": Body(
        lambda c: path(star(64, 67, 46, 34, 12), shade(c, 0.8)) + circle(64, 67, 31, c),
        face=(64, 67, 0.95), top=(32, 24), arms=(36, 74), feet=102,
        colours=("yellow", "orange", "red", "pink", "white")),
    "moon": Body(
        lambda c: circle(64, 67, 37, c) + patch("M70 31 C108 40 110 96 68 103 C92 92 94 46 70 31Z", shade(c, 0.82))
        + spots(shade(c, 0.82), (42, 48, 6, 5), (36, 74, 4, 4), (48, 94, 6, 4))
        + spots(shade(c, 0.7), (92, 54, 3, 4), (90, 82, 4, 5)),
        face=(64, 67, 1), top=(31, 26), arms=(36, 74), feet=102, colours=("yellow", "white", "gray", "blue", "orange")),
    "planet": Body(
        lambda c: path("M14 84 C14 70 40 66 64 66 C88 66 114 70 114 84 C114 96 88 98 64 98 C40 98 14 96 14 84Z", GOLD)
        + circle(64, 64, 34, c) + mirrored(patch("M90 43 C84 46 78 47 74 46 C78 42 82 40 87 39.5Z", shade(c)))
        + path("M31 77 C38 86 90 86 97 77 C104 78 108 81 108 84 C104 91 84 92 64 92 C44 92 24 91 20 84 "
               "C20 81 24 78 31 77Z", GOLD),
        face=(64, 60, 1), top=(30, 26), arms=(34, 66), feet=97,
        colours=("blue", "orange", "red", "purple", "teal", "green", "pink", "gray")),
    "cloud": Body(
        lambda c: path("M36 94 C20 94 18 72 34 70 C30 50 50 42 58 50 C66 36 90 42 92 62 C110 62 112 94 92 94 "
                       "C84 101 72 99 66 96 C58 101 44 100 36 94Z", c),
        face=(64, 73, 1), top=(45, 22), arms=(41, 84), feet=97, colours=("white", "gray", "blue", "pink", "purple")),
    "drop": Body(
        lambda c: path("M64 24 C70 42 97 58 97 78 C97 96 82 104 64 104 C46 104 31 96 31 78 C31 58 58 42 64 24Z", c)
        + line("M39 80 C40 88 44 93 50 96", WHITE, 3),
        face=(64, 75, 1), top=(33, 12), arms=(32, 80), feet=102, colours=ANY),
    "snowman": Body(
        lambda c: ellipse(64, 86, 34, 21, c) + circle(64, 54, 29, c)
        + spots(INK, (64, 91, 2.2, 2.2), (64, 99, 2.2, 2.2)) + path("M62 56 L76 60 L62 63Z", BEAK),
        face=(64, 57, 0.95), top=(27, 23), arms=(33, 86), feet=105, colours=("white", "blue", "pink", "gray")),
    "flame": Body(
        lambda c: path("M68 14 C66 32 98 48 98 76 C98 96 82 104 64 104 C46 104 30 96 30 76 C30 62 36 52 40 38 "
                       "C46 42 50 46 52 50 C58 42 66 30 68 14Z", c)
        + patch("M66 44 C72 54 90 62 90 78 C90 94 78 101 64 101 C50 101 38 94 38 78 C38 70 42 64 44 58 "
                "C48 60 52 62 54 65 C60 60 66 54 66 44Z", GOLD),
        face=(64, 78, 0.95), top=(33, 16), arms=(33, 80), feet=102,
        colours=("red", "orange", "blue", "purple", "green")),
    "rock": Body(
        lambda c: path("M32 98 L22 78 L32 50 L54 32 L80 36 L98 56 L106 84 L94 99 L64 103Z", c)
        + line("M54 32 L48 46 L32 50 M48 46 L40 58 M98 56 L88 60 L84 50 M106 84 L96 88 L94 99 M32 98 L38 90",
               shade(c, 0.72), 2),
        face=(64, 70, 1), top=(34, 22), arms=(37, 74), feet=102,
        colours=("gray", "brown", "blue", "purple", "teal", "red")),
    "diamond": Body(
        lambda c: path("M44 30 L84 30 L106 54 L71 97 Q64 105 57 97 L22 54Z", c)
        + patch("M45 31.5 L56 31.5 L46 53 L25 53Z", "rgba(255,255,255,0.35)")
        + line("M23 54 L40 54 M105 54 L88 54 M56 31 L47 50 M72 31 L81 50 M57 96 L52 84 M71 96 L76 84", shade(c), 2),
        face=(64, 60, 0.95), top=(30, 22), arms=(29, 70), feet=93, colours=ANY),
    "shell": Body(
        lambda c: path("M46 90 L38 104 Q64 109 90 104 L82 90Z", c)
        + path("M50 100 C34 92 20 76 20 62 C20 53 28 48 35 51 C33 40 44 32 52 38 C55 28 73 28 76 38 "
               "C84 32 95 40 93 51 C100 48 108 53 108 62 C108 76 94 92 78 100 Q64 104 50 100Z", c)
        + line("M52 39 L55 50 M76 39 L73 50 M36 52 L43 60 M92 52 L85 60 M59 98 L57 90 M69 98 L71 90 M49 97 L44 89 "
               "M79 97 L84 89", shade(c), 2),
        face=(64, 68, 1), top=(32, 26), arms=(39, 76), feet=105,
        colours=("pink", "orange", "white", "purple", "yellow", "blue")),
    # Things, shapes and made-up creatures
    "heart": Body(
        lambda c: path("M64 103 C60 103 24 78 24 54 C24 30 54 28 64 48 C74 28 104 30 104 54 C104 78 68 103 64 103Z", c),
        face=(64, 65, 1), top=(41, 26), arms=(34, 74), feet=97, colours=ANY),
    "ball": Body(
        lambda c: circle(64, 68, 36, c),
        face=(64, 68, 1), top=(33, 26), arms=(36, 72), feet=102, colours=ANY),
    "triangle": Body(
        lambda c: path("M64 24 L106 101 L22 101Z", c),
        face=(64, 77, 0.9), top=(33, 10), arms=(28, 80), feet=101, colours=ANY),
    "bean": Body(
        lambda c: path("M46 28 C70 18 98 34 99 66 C100 92 82 106 60 104 C42 102 30 90 34 76 C37 66 26 60 28 48 "
                       "C30 38 38 31 46 28Z", c)
        + line("M90 52 C93 60 93 68 92 74", WHITE, 3),
        face=(64, 65, 1), top=(26, 22), arms=(32, 80), feet=102,
        colours=("red", "green", "brown", "white", "yellow", "purple")),
    "bell": Body(
        lambda c: circle(64, 28, 6, shade(c, 0.7)) + circle(64, 100, 9, shade(c, 0.7))
        + path("M64 30 C46 30 38 46 37 64 C36 80 32 88 24 96 C40 102 88 102 104 96 C96 88 92 80 91 64 "
               "C90 46 82 30 64 30Z", c)
        + line("M31 89 C48 94 80 94 97 89", shade(c), 2.4),
        face=(64, 64, 1), top=(30, 20), arms=(28, 78), feet=100,
        colours=("yellow", "red", "gray", "blue", "orange", "pink")),
    "balloon": Body(
        lambda c: line("M64 104 C58 110 70 114 64 124") + path("M64 98 L57 107 Q64 109 71 107Z", c)
        + path(symmetric((64, 22), (88, 31), (99, 56), (90, 80), (73, 98), (64, 101)), c)
        + line("M38 58 C38 48 42 41 48 37", WHITE, 3.4),
        face=(64, 63, 1), top=(24, 22), arms=(34, 70), feet=None, colours=ANY),
    "bulb": Body(
        lambda c: path("M50 86 L52 101 Q64 108 76 101 L78 86Z", "#b4b4bc") + line("M51 94 Q64 98 77 94")
        + path("M64 24 C86 24 99 40 99 58 C99 74 84 80 80 89 Q64 93 48 89 C44 80 29 74 29 58 C29 40 42 24 64 24Z", c)
        + line("M37 56 C38 46 42 40 48 36", WHITE, 3.4),
        face=(64, 59, 1), top=(26, 24), arms=(33, 66), feet=103,
        colours=("yellow", "white", "orange", "blue", "pink", "green")),
    "rocket": Body(
        lambda c: path("M56 98 C54 104 58 108 58 112 C61 110 62 111 64 116 C66 111 67 110 70 112 "
                       "C70 108 74 104 72 98Z", GOLD)
        + mirrored(path("M90 66 C104 74 108 88 106 102 C98 96 92 94 84 94Z", shade(c, 0.7)))
        + path("M64 16 C84 30 96 52 94 72 C93 86 88 94 84 99 Q64 104 44 99 C40 94 35 86 34 72 C32 52 44 30 64 16Z", c)
        + path("M64 16 C73 22 80 30 85 39 Q64 46 43 39 C48 30 55 22 64 16Z", shade(c, 0.7)),
        face=(64, 66, 1), top=(26, 15), arms=(30, 70), feet=101,
        colours=("white", "red", "gray", "blue", "yellow", "teal", "pink")),
    "ghost": Body(
        lambda c: path("M30 102 L30 64 C30 40 46 26 64 26 C82 26 98 40 98 64 L98 102 L86.5 94 L75 102 L64 94 L53 102 "
                       "L41.5 94Z", c),
        face=(64, 62, 1), top=(28, 24), arms=(34, 72), feet=None,
        colours=("white", "blue", "pink", "purple", "green", "gray")),
    "slime": Body(
        lambda c: path("M18 99 C16 90 28 92 30 80 C32 54 44 34 64 34 C84 34 96 54 98 80 C100 92 112 90 110 99 "
                       "C108 107 96 100 88 104 C80 108 74 101 64 104 C54 107 48 101 40 104 C32 107 20 107 18 99Z", c)
        + line("M42 62 C44 54 48 48 53 45", WHITE, 3.4)
        + spots(shade(c), (90, 88, 3, 3), (38, 90, 4, 4), (84, 96, 2, 2)),
        face=(64, 73, 1), top=(36, 20), arms=(33, 78), feet=None, colours=ANY),
    "alien": Body(
        lambda c: mirrored(line("M76 38 C80 26 86 22 92 20") + circle(93, 19, 5, GOLD))
        + path(symmetric((64, 32), (88, 37), (103, 58), (94, 82), (78, 100), (64, 104)), c)
        + spots(shade(c), (40, 52, 4, 3), (64, 41, 5, 2.6), (88, 52, 4, 3)),
        face=(64, 66, 1), top=(33, 25), arms=(36, 76), feet=103,
        colours=("green", "teal", "purple", "blue", "gray", "pink")),
    "monster": Body(
        lambda c: mirrored(path("M78 44 C90 40 94 28 90 16 C104 22 106 42 92 54Z", CREAM))
        + path(star(64, 68, 41, 35, 24), c) + spots(CREAM, (64, 94, 18, 6)),
        face=(64, 67, 1), top=(31, 24), arms=(37, 74), feet=107, colours=ANY),
}
# fmt: on


def random_blob(rng: Random) -> Body:
    """A body nobody has seen: its outline is random, and its anchors are read from the outline."""
    outline = _random_outline(rng)
    while _fill(outline) > 0.75:  # of its bounding box a box fills all, a circle 0.785
        outline = _random_outline(rng)
    feature = rng.choice((None, "ears", "horns", "spots"))
    size = rng.uniform(7, 12)
    along = rng.randint(4, 8)  # the outline's points are 6 degrees apart, the first is straight up
    pair = (outline[along], outline[-along])
    dots = [(64 + (x - 64) * 0.82, 68 + (y - 68) * 0.82, 3.5, 3.5) for x, y in rng.sample(outline, 6)]

    def paint(c: str) -> str:
        body = path(smooth(outline), c)
        if feature == "ears":
            return "".join(circle(x, y, size, c) for x, y in pair) + body
        if feature == "horns":
            return "".join(path(_horn(x, y, 2 * size), CREAM) for x, y in pair) + body
        if feature == "spots":
            return body + spots(shade(c), *dots)
        return body

    face_y = max(range(62, 79), key=lambda y: _room(outline, y))
    top_y = min(_crossings(outline, x=64))
    arms_y = face_y + 8
    return Body(
        paint,
        face=(64, face_y, max(0.75, min(1, _room(outline, face_y) / 24))),
        top=(top_y, max(12, min(26, _half_width(outline, top_y + 8)))),
        arms=(_half_width(outline, arms_y), arms_y),
        feet=min(max(_crossings(outline, x=64 - 11)), max(_crossings(outline, x=64 + 11))),
        colours=ANY,
    )


def _random_outline(rng: Random) -> list[Point]:
    """60 points of a wavy closed curve, most often symmetric, centred on x = 64 and standing on y = 103.

    In polar coordinates the radius is 1 plus a few low harmonics of the angle from straight up."""
    skewed = rng.random() < 0.3
    waves = [(k, rng.uniform(-0.25, 0.25) / k**0.6, rng.uniform(-0.8, 0.8) if skewed else 0) for k in (2, 3, 5, 6)]
    angles = [2 * math.pi * i / 60 for i in range(60)]
    radii = [1 + sum(height * math.cos(k * angle + phase) for k, height, phase in waves) for angle in angles]
    xs = [radius * math.sin(angle) for radius, angle in zip(radii, angles, strict=True)]
    ys = [-radius * math.cos(angle) for radius, angle in zip(radii, angles, strict=True)]
    half_width, top = rng.uniform(33, 40), rng.uniform(27, 38)
    across, down = 2 * half_width / (max(xs) - min(xs)), (103 - top) / (max(ys) - min(ys))
    return [(64 - half_width + (x - min(xs)) * across, top + (y - min(ys)) * down) for x, y in zip(xs, ys, strict=True)]


def _horn(x: float, y: float, height: float) -> str:
    """Path data of a horn that leans outwards."""
    return f"M{x - 7:.1f} {y + 8:.1f} L{x + (x - 64) / 4:.1f} {y - height:.1f} L{x + 7:.1f} {y + 8:.1f}Z"


def _fill(outline: list[Point]) -> float:
    """The part of its bounding box that the outline encloses."""
    xs, ys = zip(*outline, strict=True)
    area = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in _edges(outline))) / 2
    return area / ((max(xs) - min(xs)) * (max(ys) - min(ys)))


def _room(outline: list[Point], face_y: float) -> float:
    """Half of the width that the outline leaves from the eyes to the mouth of a face there."""
    return min(_half_width(outline, face_y - 12), _half_width(outline, face_y + 16))


def _half_width(outline: list[Point], y: float) -> float:
    """How far the outline reaches from x = 64 to its nearer side at that height."""
    xs = _crossings([(y, x) for x, y in outline], x=y)
    return min(64 - min(xs), max(xs) - 64)


def _crossings(outline: list[Point], x: float) -> list[float]:
    """The heights at which the closed outline, taken as a polygon, crosses the vertical at x."""
    return [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for (x0, y0), (x1, y1) in _edges(outline) if (x0 < x) != (x1 < x)]


def _edges(outline: list[Point]) -> list[tuple[Point, Point]]:
    return list(zip(outline, outline[1:] + outline[:1], strict=True))
