"""What one sees of an avatar, in the vocabulary that the characters share: a function for each style in draw.mjs.

Each is given the attributes of one avatar, DiceBear's options by DiceBear's names. The tables say what one sees, not
what DiceBear calls it: its "wink" is now of the left eye and now of the right, its "humble" eyes are closed ones.
Options that draw.mjs leaves out are not in them.
"""

from experiments.tiny_base.vocabulary import Look

Attributes = dict[str, str | None]


def personas(attributes: Attributes) -> Look:
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


def big_smile(attributes: Attributes) -> Look:
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


def micah(attributes: Attributes) -> Look:
    kinds = {"fonze": "short", "dannyPhantom": "short", "mrT": "mohawk", "full": "wavy", "pixie": "bob"}
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


def toon_head(attributes: Attributes) -> Look:
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


def miniavs(attributes: Attributes) -> Look:
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


def dylan(attributes: Attributes) -> Look:
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


def fun_emoji(attributes: Attributes) -> Look:
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


def avataaars(attributes: Attributes) -> Look:
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
