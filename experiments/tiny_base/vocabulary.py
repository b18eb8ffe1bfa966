"""What can be said of a picture: one vocabulary for avatars and characters, and the captions made of it.

That both speak alike is what lets an avatar's caption be a prompt for a character, word for word.
"""

from dataclasses import dataclass, replace
from functools import cache
from random import Random

from experiments.tiny_base.palette import BACKGROUNDS, COATS, HAIRS, SKINS

HAIR = {
    "short": "with short {} hair",
    "long": "with long {} hair",
    "wavy": "with wavy {} hair",
    "curly": "with curly {} hair",
    "spiky": "with spiky {} hair",
    "bob": "with {} bob hair",
    "bun": "with a {} bun",
    "mohawk": "with a {} mohawk",
    "ponytail": "with a {} ponytail",
    "braids": "with {} braids",
}
HATS = ("top hat", "cap", "beanie", "party hat", "crown", "bow", "chef hat", "straw hat", "wizard hat")
GLASSES = {"round": "wearing round glasses", "square": "wearing square glasses", "sun": "wearing sunglasses"}
FACIAL_HAIR = {
    "moustache": "with a moustache",
    "beard": "with a full beard",
    "goatee": "with a goatee",
    "stubble": "with a stubble",
}
EYES = {  # left and right are the subject's own
    "open": None,
    "wink_left": "winking with its left eye",
    "wink_right": "winking with its right eye",
    "closed": "with its eyes closed",
    "happy": "with happy eyes",
    "sad": "with sad eyes",
    "big": "with big round eyes",
    "angry": "with angry eyes",
    "star": "with star eyes",
    "heart": "with heart eyes",
}
MOUTHS = {
    "smile": "smiling",
    "laugh": "laughing",
    "frown": "frowning",
    "surprised": "looking surprised",
    "serious": "looking serious",
    "tongue": "sticking out its tongue",
    "teeth": "showing its teeth",
}
MARKS = {
    "flower": "with a {} flower",
    "heart": "with a {} heart",
    "star": "with a {} star",
    "dots": "with {} dots",
    "stripes": "with {} stripes",
    "bow tie": "wearing a {} bow tie",
    "scarf": "wearing a {} scarf",
}
HANDS = {"left": "raising its left hand", "right": "raising its right hand", "both": "raising both hands"}

SYNONYMS = {
    "winking with its left eye": "winking",
    "winking with its right eye": "winking",
    "with its eyes closed": "with closed eyes",
    "laughing": "with a big smile",
    "frowning": "looking sad",
}


@dataclass(frozen=True)
class Look:
    """One subject and all that a caption can say of it."""

    subject: str  # "person", "red apple", "green emoji"
    style: str | None = None  # how an avatar is drawn: "flat", "inked", ...
    skin: str | None = None  # a person's: one of palette.SKINS
    hair: tuple[str, str] | None = None  # (one of HAIR, one of palette.HAIRS)
    hat: tuple[str, str] | None = None  # (one of HATS, one of palette.COATS)
    glasses: str | None = None
    facial_hair: str | None = None
    eyes: str = "open"
    mouth: str | None = "smile"  # None where nothing can be said of it
    cheeks: bool = False
    shirt: str | None = None  # one of palette.COATS
    mark: tuple[str, str] | None = None  # (one of MARKS, one of palette.COATS)
    hands: str | None = None  # which are raised

    @property
    def is_character(self) -> bool:
        """Drawn by us; the others are avatars."""
        return self.subject != "person" and not self.subject.endswith("emoji")

    @property
    def name(self) -> str:
        """The subject as a full caption names it: "a flat cartoon tan-skinned person", "a cartoon red apple"."""
        skin = f"{self.skin}-skinned " if self.skin else ""
        style = f"{self.style} " if self.style else ""
        return f"{article(style or 'cartoon')} {style}cartoon {skin}{self.subject}"


def phrases(look: Look) -> list[str]:
    """What is to be said of a look, in the order of the full caption; eyes behind sunglasses are not."""
    said = [
        look.hair and HAIR[look.hair[0]].format(look.hair[1]),
        look.hat and f"wearing {article(look.hat[1])} {look.hat[1]} {look.hat[0]}",
        look.glasses and GLASSES[look.glasses],
        look.facial_hair and FACIAL_HAIR[look.facial_hair],
        EYES[look.eyes] if look.glasses != "sun" else None,
        look.mouth and MOUTHS[look.mouth],
        "with pink cheeks" if look.cheeks else None,
        look.shirt and f"wearing {article(look.shirt)} {look.shirt} shirt",
        look.mark and MARKS[look.mark[0]].replace("a {}", f"{article(look.mark[1])} {{}}").format(look.mark[1]),
        look.hands and HANDS[look.hands],
    ]
    return [phrase for phrase in said if phrase]


def full_caption(look: Look, background: str, name: str | None = None) -> str:
    """Everything, in one order: what the captioner learns to write. `name` replaces the subject."""
    return ", ".join([f"{name or look.name} with {article(background)} {background} background", *phrases(look)])


def parsed(caption: str) -> tuple[Look, str | None]:
    """The look and the background that a caption in this vocabulary tells of; phrases it does not know are left out.

    >>> look, background = parsed("A HANA_TOFU with a teal background, with a red bun, laughing")
    >>> look.subject, look.hair, look.mouth, background
    ('HANA_TOFU', ('bun', 'red'), 'laugh', 'teal')
    """
    head, *said = caption.split(", ")
    name, background = parted(head)
    look = Look(subject=name.partition(" ")[2].removeprefix("cartoon "), mouth=None)
    for phrase in said:
        field, value = meanings().get(phrase, ("subject", look.subject))
        look = replace(look, **{field: value})
    return look, background


def parted(head: str) -> tuple[str, str | None]:
    """The first phrase of a caption as subject and background: ("a cartoon red apple", "teal")."""
    name, _, where = head.rpartition(" with a")
    return name, where.removeprefix("n ").strip().removesuffix(" background") or None


@cache
def meanings() -> dict[str, tuple[str, object]]:
    """Every phrase with the field of a Look and the value that it tells of."""
    values = {
        "hair": [(kind, colour) for kind in HAIR for colour in HAIRS],
        "hat": [(kind, colour) for kind in HATS for colour in COATS],
        "mark": [(kind, colour) for kind in MARKS for colour in COATS],
        "glasses": GLASSES,
        "facial_hair": FACIAL_HAIR,
        "eyes": EYES,
        "mouth": MOUTHS,
        "cheeks": [True],
        "shirt": COATS,
        "hands": HANDS,
    }
    told = [(field, each, replace(Look("", mouth=None), **{field: each})) for field in values for each in values[field]]
    return {phrase: (field, each) for field, each, look in told for phrase in phrases(look)}


def free_caption(look: Look, background: str, rng: Random) -> str:
    """As a person might write it: some things left out, in another order, by other words, or by a name.

    One in four calls a character by a name that means nothing ("A ZUKO_MERI with a green background"), so that a
    trigger word which the base has never seen says nothing about the body either."""
    said = [SYNONYMS[p] if p in SYNONYMS and rng.random() < 0.25 else p for p in phrases(look) if rng.random() > 0.1]
    if rng.random() < 0.3:
        rng.shuffle(said)
    name = _free_name(look, rng)
    where = f"{article(background)} {background} background"
    form = rng.random()
    if form < 0.6:
        caption = ", ".join([f"{name} with {where}", *said])
    elif form < 0.8:
        caption = ", ".join([name, *said, f"{background} background"])
    elif form < 0.93:
        caption = ", ".join([f"{name} on {where}", *said])
    else:
        caption = ", ".join([name, *said])
    return caption[0].upper() + caption[1:] if rng.random() < 0.5 else caption


def _free_name(look: Look, rng: Random) -> str:
    """Names are for characters: with hair and a shirt, a name that avatars bore too would as soon be a person."""
    form = rng.random()
    if form < 0.25 and look.is_character:
        return f"a {pseudonym(rng)}" if form < 0.2 else f"a {pseudonym(rng)} {look.subject}"
    if form < 0.35:
        return f"{article(look.subject)} {look.subject}"
    if form < 0.45:
        return f"a cartoon {look.subject}"
    if form < 0.5 and look.is_character:
        return "a cartoon character"
    return look.name


def pseudonym(rng: Random) -> str:
    """A made-up name: "ZUKO_MERI", "bafun"."""

    def word() -> str:
        syllables = (rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
        return "".join(syllables) + (rng.choice("nrsmk") if rng.random() < 0.3 else "")

    name = word() if rng.random() < 0.35 else f"{word()}_{word()}"
    return name.upper() if rng.random() < 0.7 else name


def article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def altered(look: Look, background: str, rng: Random) -> tuple[Look, str]:
    """The same picture told wrongly in one thing, for a judge that must see the difference: (look, background)."""
    wrong: list[tuple[Look, str]] = [(look, rng.choice([name for name in BACKGROUNDS if name != background]))]

    def other(field: str, values: list) -> None:
        values = [value for value in values if value != getattr(look, field)]
        wrong.append((replace(look, **{field: rng.choice(values)}), background))

    other("glasses", [None, *GLASSES])
    other("facial_hair", [None, *FACIAL_HAIR])
    if look.glasses != "sun":
        other("eyes", list(EYES))
    if look.mouth:
        other("mouth", list(MOUTHS))
    if look.is_character:
        other("hands", [None, *HANDS])
    if look.hair:
        other("hair", [(kind, look.hair[1]) for kind in HAIR])
        other("hair", [(look.hair[0], colour) for colour in HAIRS])
    if look.hat:
        other("hat", [(kind, look.hat[1]) for kind in HATS])
        other("hat", [(look.hat[0], colour) for colour in COATS])
    if look.shirt:
        other("shirt", list(COATS))
    if look.mark:
        other("mark", [(look.mark[0], colour) for colour in COATS])
    if look.skin:
        other("skin", list(SKINS))
    words = look.subject.split()
    if words[0] in COATS:
        other("subject", [" ".join([colour, *words[1:]]) for colour in COATS])
    return rng.choice(wrong)
