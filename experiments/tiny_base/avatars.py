"""DiceBear avatars, as dicebear/draw.mjs draws them, described in the vocabulary that the characters share.

The tables say what one sees, not what DiceBear calls it: its "wink" is now of the left eye and now of the right, its
"humble" eyes are closed ones. Options that draw.mjs leaves out are not in them.
"""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from math import radians, sin
from pathlib import Path
from random import Random

from experiments.tiny_base.vocabulary import Look

Attributes = dict[str, str | None]


@dataclass(frozen=True)
class Style:
    describe: Callable[[Attributes], Look]
    frame: tuple[float, float, float]  # left, top and size of the square that is shown, in the style's own units
    bust: bool = True  # whether it stands on the picture's lower border; else a head that floats


def read(path: str | Path) -> list[str]:
    """The lines of a file by draw.mjs, which may be compressed (.xz)."""
    data = Path(path).read_bytes()
    if Path(path).suffix == ".xz":
        data = lzma.decompress(data)
    return data.decode().splitlines()


def random_avatar(line: str, rng: Random) -> tuple[str, Look]:
    """The avatar of one line in a random pose: its SVG document, and what can be said of it."""
    avatar = json.loads(line)
    svg = document(avatar["style"], avatar["svg"])
    return pose(svg, rng, STYLES[avatar["style"]].bust), describe(avatar["style"], avatar["attributes"])


def describe(style: str, attributes: Attributes) -> Look:
    return STYLES[style].describe(attributes)


def document(style: str, svg: str) -> str:
    """The avatar as a document of 128 x 128, in a frame that fits the style."""
    left, top, size = STYLES[style].frame
    fit = f"scale({128 / size:.5g}) translate({-left} {-top})"
    return _document(f'<g fill="none" transform="{fit}">{_elements(svg)}</g>')


def pose(svg: str, rng: Random, bust: bool) -> str:
    """A document of 128 x 128 with its avatar a little turned, scaled and moved."""
    turn = rng.uniform(-6, 6)
    dx = rng.uniform(-5, 5)
    if bust:
        x, y = 64, 128
        scale = rng.uniform(0.86, 1)
        dy = 56 * sin(radians(abs(turn)))  # else one end of the shoulders would be lifted off the lower border
    else:
        x, y = 64, 64
        scale = rng.uniform(0.8, 1)
        dy = rng.uniform(-5, 5)
    move = f"translate({x + dx:.2f} {y + dy:.2f}) rotate({turn:.2f}) scale({scale:.3f}) translate({-x} {-y})"
    return _document(f'<g transform="{move}">{_elements(svg)}</g>')


def _document(elements: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{elements}</svg>'


def _elements(svg: str) -> str:
    return svg[svg.index(">") + 1 : svg.rindex("</svg>")]


def _describe_personas(attributes: Attributes) -> Look:
    kinds = {
        "long": "long",
        "extraLong": "long",
        "shortCombover": "short",
        "shortComboverChops": "short",
        "fade": "short",
        "curlyHighTop": "curly",
        "curly": "curly",
        "bobCut": "bob",
        "bobBangs": "bob",
        "curlyBun": "bun",
        "straightBun": "bun",
    }
    eyes = {"sleep": "closed", "wink": "wink_left", "happy": "happy"}
    glasses = {"glasses": "square", "sunglasses": "sun"}
    mouths = {"smile": "smile", "frown": "frown", "surprise": "surprised", "bigSmile": "laugh"}
    facial_hair = {
        "beardMustache": "beard",
        "pyramid": "moustache",
        "walrus": "moustache",
        "goatee": "goatee",
        "shadow": "stubble",
    }
    hair = attributes["hair"]
    return Look(
        subject="person",
        style="flat",
        skin=attributes["skinColor"],
        hair=(kinds[hair], attributes["hairColor"]) if hair in kinds else None,
        hat=(hair, attributes["hatColor"]) if hair in ("cap", "beanie") else None,
        glasses=glasses.get(attributes["eyes"]),
        facial_hair=facial_hair.get(attributes["facialHair"]),
        eyes=eyes.get(attributes["eyes"], "open"),
        # The beard has a mouth of its own.
        mouth="laugh" if attributes["facialHair"] == "beardMustache" else mouths[attributes["mouth"]],
        shirt=attributes["clothingColor"],
    )


def _describe_big_smile(attributes: Attributes) -> Look:
    kinds = {
        "shortHair": "short",
        "shavedHead": "short",
        "bowlCutHair": "short",
        "mohawk": "mohawk",
        "wavyBob": "wavy",
        "straightHair": "long",
        "braids": "braids",
        "bunHair": "bun",
        "froBun": "bun",
        "bangs": "bob",
        "curlyShortHair": "curly",
    }
    eyes = {
        "normal": "open",
        "starstruck": "star",
        "winking": "wink_right",
        "sleepy": "closed",
        "sad": "sad",
        "angry": "angry",
    }
    glasses = {"glasses": "round", "sunglasses": "sun"}
    mouths = {
        "openedSmile": "laugh",
        "unimpressed": "serious",
        "teethSmile": "teeth",
        "awkwardSmile": "teeth",
        "braces": "laugh",
        "kawaii": "smile",
    }
    return Look(
        subject="person",
        style="big-head",
        skin=attributes["skinColor"],
        hair=(kinds[attributes["hair"]], attributes["hairColor"]),
        glasses=glasses.get(attributes["accessories"]),
        facial_hair="moustache" if attributes["accessories"] == "mustache" else None,
        eyes=eyes[attributes["eyes"]],
        mouth=mouths[attributes["mouth"]],
    )


def _describe_micah(attributes: Attributes) -> Look:
    kinds = {
        "fonze": "short",
        "dannyPhantom": "short",
        "mrT": "mohawk",
        "full": "wavy",
        "pixie": "bob",
    }
    lines = {"smile": "smile", "smirk": "smile", "frown": "frown", "sad": "frown"}
    open_mouths = {"surprised": "surprised", "laughing": "laugh", "nervous": "teeth"}
    facial_hair = {"beard": "beard", "scruff": "stubble"}
    mouth = attributes["mouth"]
    black_beard = attributes["facialHair"] == "beard" and attributes["hairColor"] == "black"
    return Look(
        subject="person",
        style="inked",
        skin=attributes["baseColor"],
        hair=(kinds[attributes["hair"]], attributes["hairColor"]) if attributes["hair"] in kinds else None,
        glasses=attributes["glasses"],
        facial_hair=facial_hair.get(attributes["facialHair"]),
        eyes="happy" if attributes["eyes"] == "smiling" else "open",
        mouth=None if black_beard and mouth in lines else (lines | open_mouths)[mouth],
        shirt=attributes["shirtColor"],
    )


def _describe_toon_head(attributes: Attributes) -> Look:
    kinds = {"sideComed": "short", "undercut": "short", "spiky": "spiky", "bun": "bun"}
    rear_kinds = {"longStraight": "long", "longWavy": "wavy", "shoulderHigh": "wavy", "neckHigh": "bob"}
    eyes = {"bow": "happy", "humble": "closed", "wink": "wink_right"}
    eyebrows = {"angry": "angry", "sad": "sad"}
    mouths = {"laugh": "laugh", "angry": "frown", "agape": "surprised", "sad": "serious"}
    facial_hair = {"moustacheTwirl": "moustache", "fullBeard": "beard", "longBeard": "beard"}
    kind = rear_kinds.get(attributes["rearHair"]) or kinds[attributes["hair"]]
    return Look(
        subject="person",
        style="toon",
        skin=attributes["skinColor"],
        hair=(kind, attributes["hairColor"]),
        facial_hair=facial_hair.get(attributes["beard"]),
        eyes=eyes.get(attributes["eyes"]) or eyebrows.get(attributes["eyebrows"], "open"),
        mouth=mouths[attributes["mouth"]],
        shirt=attributes["clothesColor"],
    )


def _describe_miniavs(attributes: Attributes) -> Look:
    kinds = {
        "ponyTail": "ponytail",
        "long": "long",
        "curly": "curly",
        "stylish": "short",
        "elvis": "short",
        "classic01": "short",
        "classic02": "short",
    }
    return Look(
        subject="person",
        style="mini",
        skin=attributes["skinColor"],
        hair=(kinds[attributes["hair"]], attributes["hairColor"]),
        glasses="round" if attributes["glasses"] else None,
        facial_hair="moustache" if attributes["mustache"] else None,
        mouth="laugh",
        cheeks=attributes["blushes"] is not None,
        shirt=attributes["bodyColor"],
    )


def _describe_dylan(attributes: Attributes) -> Look:
    kinds = {
        "plain": "short",
        "wavy": "short",
        "parting": "short",
        "flatTop": "short",
        "shortCurls": "curly",
        "longCurls": "curly",
        "spiky": "spiky",
        "roundBob": "long",
        "bangs": "bob",
    }
    mouths = {"happy": "smile", "angry": "frown", "neutral": "serious", "superHappy": "laugh", "sad": "frown"}
    return Look(
        subject="person",
        style="doodle",
        skin=attributes["skinColor"],
        hair=(kinds[attributes["hair"]], attributes["hairColor"]),
        facial_hair="stubble" if attributes["facialHair"] else None,
        eyes=attributes["mood"] if attributes["mood"] in ("angry", "sad") else "open",
        mouth=mouths[attributes["mood"]],
    )


def _describe_fun_emoji(attributes: Attributes) -> Look:
    eyes = {
        "sad": "sad",
        "pissed": "angry",
        "wink": "wink_left",
        "wink2": "wink_right",
        "closed": "happy",
        "closed2": "closed",
        "love": "heart",
        "stars": "star",
    }
    glasses = {"glasses": "square", "shades": "sun"}
    mouths = {
        "plain": "serious",
        "lilSmile": "smile",
        "wideSmile": "smile",
        "sad": "frown",
        "pissed": "frown",
        "smileTeeth": "teeth",
        "smileLol": "laugh",
        "tongueOut": "tongue",
    }
    return Look(
        subject=f"{attributes['emojiColor']} emoji",
        glasses=glasses.get(attributes["eyes"]),
        eyes=eyes.get(attributes["eyes"], "open"),
        mouth=mouths[attributes["mouth"]],
    )


def _describe_avataaars(attributes: Attributes) -> Look:
    kinds = {
        "bob": "bob",
        "miaWallace": "bob",
        "bun": "bun",
        "curly": "curly",
        "fro": "curly",
        "curvy": "wavy",
        "straight01": "long",
        "straight02": "long",
        "straightAndStrand": "long",
        "shortFlat": "short",
        "shortRound": "short",
        "theCaesar": "short",
    }
    eyes = {"closed": "closed", "happy": "happy", "hearts": "heart", "wink": "wink_left"}
    glasses = {"round": "round", "prescription02": "square", "sunglasses": "sun", "wayfarers": "sun"}
    mouths = {
        "smile": "laugh",
        "twinkle": "smile",
        "serious": "serious",
        "sad": "frown",
        "tongue": "tongue",
        "grimace": "teeth",
    }
    facial_hair = {
        "beardMedium": "beard",
        "beardMajestic": "beard",
        "moustacheFancy": "moustache",
        "moustacheMagnum": "moustache",
    }
    top = attributes["top"]
    return Look(
        subject="person",
        skin=attributes["skinColor"],
        hair=(kinds[top], attributes["hairColor"]) if top in kinds else None,
        hat=None if top in kinds else ("beanie", attributes["hatColor"]),
        glasses=glasses.get(attributes["accessories"]),
        facial_hair=facial_hair.get(attributes["facialHair"]),
        eyes=eyes.get(attributes["eyes"], "open"),
        mouth=mouths[attributes["mouth"]],
        shirt=attributes["clothesColor"],
    )


STYLES = {
    "personas": Style(_describe_personas, frame=(2, 0, 60)),
    "big-smile": Style(_describe_big_smile, frame=(-40, -65, 560), bust=False),
    "micah": Style(_describe_micah, frame=(-15, -30, 390)),
    "toon-head": Style(_describe_toon_head, frame=(-66, -100, 900)),
    "miniavs": Style(_describe_miniavs, frame=(-12, -6, 84)),
    "dylan": Style(_describe_dylan, frame=(-4, -5, 90), bust=False),
    "fun-emoji": Style(_describe_fun_emoji, frame=(-5, -5, 210), bust=False),
    # Not in the training data.
    "avataaars": Style(_describe_avataaars, frame=(-10, -20, 300)),
}
