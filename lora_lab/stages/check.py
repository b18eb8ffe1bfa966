"""stage=check: what training would refuse, and what would make a worse LoRA, before any GPU time is spent."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_lab.base.locate import locate_folder, locate_model
from lora_lab.captions.files import Texts, read_caption_lists
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.buckets import aspect_buckets, enlargement, nearest_bucket
from lora_lab.images.dataset import (
    apply_caption_affixes,
    list_names,
    missing_captions,
    missing_picture,
    same_name_twice,
)
from lora_lab.images.masks import Masks, find_masks
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures, same_names, unsupported
from lora_lab.runs import write_json
from lora_lab.settings.schema import Config

CLIP_WINDOW = 77  # tokens, with the start and end markers

# Measured on the 24 bundled tofu pictures, which differ by a wink or a hat: by 16x16 bits the nearest two are 26 apart,
# and copies (JPEG quality 30 or 75; resized to 64..1024 px, bilinear or Lanczos) at most 8 from their original. Copies
# shrunk to nearest pixels (up to 22) go unnoticed. The usual 8x8 bits cannot tell: the nearest two 2 apart, copies 2.
HASH_SIDE, HASH_BITS = 16, 14
# The hash sees grey alone, so colours are compared too: mean difference of 16x16 thumbnails, 0..255; copies at most 2.8
COLOUR = 8.0
STOPWORDS = {"a", "an", "the", "and", "or", "of", "in", "on", "at", "with", "its", "it", "is", "to", "by", "for"}


@dataclass(frozen=True)
class Findings:
    """What the folder holds. Names are pictures' names, in natural order; check.json has all of them."""

    pictures: int
    captions: int
    buckets: dict[str, int]  # "832x1216" (width x height) -> pictures
    unreadable: dict[str, str]  # name -> why
    unmasked: dict[str, str]  # name -> why its mask cannot be used; {} without loss.mask
    uncaptioned: list[str]
    pictureless: list[str]  # captions without a picture
    caption_files: str  # why no captions could be read; "" if they could
    same_name: list[str]  # on disk twice, NFC and NFD
    same_but_case: list[tuple[str, ...]]
    unsupported: list[str]
    enlarged: dict[str, float]  # name -> scale, above 1
    duplicates: list[tuple[str, str]]  # (copy, the picture it equals)
    without_trigger: list[str]
    too_long: dict[str, int]  # name -> tokens, above 77
    in_every_caption: list[str]


@dataclass(frozen=True)
class CheckResult:
    stage: str
    errors: list[str]  # training would refuse the folder for each of these
    warnings: list[str]
    findings: Findings


def check(config: Config, folder: Path) -> CheckResult:
    """Check dataset.root; raises InputError if training would refuse it, after the whole report is written."""
    root = locate_folder("dataset.root", config.dataset.folder)
    model = config.model
    result = inspect(
        root,
        config.trigger,
        model.resolution,
        False,
        folder,
        model.bucket_step,
        token_counter(model.base),
        find_masks(config.loss.mask),
        lambda text: apply_caption_affixes(
            text, config.dataset.caption_prefix, config.dataset.caption_suffix, config.trigger
        ),
    )
    if result.errors:
        raise InputError(result.errors[0] + (f" (and {len(result.errors) - 1} more)" if result.errors[1:] else ""))
    return result


def inspect(
    root: Path,
    trigger: str,
    resolution: int,
    captions_needed: bool,
    folder: Path,
    bucket_step: int = 64,
    count_tokens: Callable[[str], int] | None = None,
    masks: Masks | None = None,
    wording: Callable[[str], str] = str,
) -> CheckResult:
    """Open every picture and read every caption under `root`; print the report and write it to `folder`/check.json.

    `count_tokens` is the model's tokenizer, start and end markers counted; `wording` is what training makes of a
    caption.
    Raises InputError only if there are no pictures."""
    paths = find_pictures(root)
    sizes, thumbnails, unreadable = _open_all(paths)
    captions, broken = _read_captions(root)
    buckets = aspect_buckets(resolution, bucket_step)
    chosen = {name: nearest_bucket(size, buckets) for name, size in sizes.items()}
    scales = {name: enlargement(size, chosen[name]) for name, size in sizes.items()}
    words = {name: [wording(text) for text in texts] for name, texts in captions.items()}
    tokens = {name: max(map(count_tokens, texts)) for name, texts in words.items()} if count_tokens else {}
    named = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")
    same_name, same_but_case = same_names(root)
    findings = Findings(
        pictures=len(paths),
        captions=sum(map(len, captions.values())),
        buckets={f"{width}x{height}": n for (width, height), n in Counter(chosen.values()).most_common()},
        unreadable=unreadable,
        unmasked=_unmasked(masks, paths, sizes) if masks else {},
        uncaptioned=[name for name in paths if name not in captions] if captions or captions_needed else [],
        pictureless=[name for name in captions if name not in paths],
        caption_files=broken,
        same_name=same_name,
        same_but_case=same_but_case,
        unsupported=unsupported(root),
        enlarged={name: round(scale, 2) for name, scale in scales.items() if scale > 1},
        duplicates=find_duplicates(thumbnails),
        without_trigger=[name for name, texts in words.items() if not all(map(named.search, texts))],
        too_long={name: count for name, count in tokens.items() if count > CLIP_WINDOW},
        in_every_caption=phrases_in_all([text for texts in captions.values() for text in texts], trigger),
    )
    errors = _errors(findings, root, captions_needed)
    result = CheckResult("check", errors, _warnings(findings, trigger, captions_needed), findings)
    write_json(folder / "check.json", asdict(result))
    say(report(result, root))
    return result


def token_counter(base: str) -> Callable[[str], int] | None:
    """Counts tokens as the base's tokenizer does; None where there is none at hand (a single file, or no network)."""
    from transformers import CLIPTokenizer

    location = locate_model("model.base", base)
    if Path(location).is_file():
        return None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(location, subfolder="tokenizer")
    except (OSError, ValueError):
        say(f"captions are not measured in tokens: the tokenizer of {base} cannot be reached")
        return None
    return lambda text: len(tokenizer(text).input_ids)


def _open_all(paths: dict[str, Path]) -> tuple[dict[str, tuple[int, int]], dict[str, "Thumbnail"], dict[str, str]]:
    """Sizes and thumbnails by name, and why the others cannot be opened; one picture is in memory at a time."""
    sizes, thumbnails, unreadable = {}, {}, {}
    for name, path in paths.items():
        try:
            picture = open_picture(path)
        except InputError as error:
            unreadable[name] = str(error)
        else:
            sizes[name] = picture.size
            thumbnails[name] = thumbnail(picture)
    return sizes, thumbnails, unreadable


def _unmasked(masks: Masks, paths: dict[str, Path], sizes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Why training would refuse the masks of those pictures whose masks it would."""
    faults = {}
    for name, size in sizes.items():
        try:
            masks.open(name, paths[name], size)
        except InputError as error:
            faults[name] = str(error)
    return faults


def _read_captions(root: Path) -> tuple[dict[str, Texts], str]:
    try:
        return read_caption_lists(root), ""
    except InputError as error:
        return {}, str(error)


@dataclass(frozen=True)
class Thumbnail:
    """What is kept of a picture to recognise its copies."""

    bits: np.ndarray  # perceptual hash, bool (16, 16)
    colours: np.ndarray  # float (16, 16, 3), 0..255


def thumbnail(picture: Image.Image) -> Thumbnail:
    import imagehash  # draws in scipy: the other stages do without

    small = picture.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    return Thumbnail(imagehash.phash(picture, hash_size=HASH_SIDE).hash, np.asarray(small, dtype=np.float64))


def find_duplicates(thumbnails: dict[str, Thumbnail]) -> list[tuple[str, str]]:
    """(copy, original) for each picture that an earlier one equals but for scale and compression."""
    originals: dict[str, Thumbnail] = {}
    copies = []
    for name, one in thumbnails.items():
        match = next((other for other, two in originals.items() if _alike(one, two)), None)
        if match is None:
            originals[name] = one
        else:
            copies.append((name, match))
    return copies


def _alike(one: Thumbnail, two: Thumbnail) -> bool:
    bits, colours = np.count_nonzero(one.bits != two.bits), np.abs(one.colours - two.colours).mean()
    return bits <= HASH_BITS and colours <= COLOUR


def phrases_in_all(captions: Sequence[str], trigger: str) -> list[str]:
    """The longest runs of words in every caption, the trigger and bare articles aside; [] below three captions.

    ["A HANA_TOFU with a red hat, smiling", "HANA_TOFU with a red hat", "HANA_TOFU in a red hat"] have ["red hat"]."""
    if len(captions) < 3:
        return []
    texts = [_words(caption, trigger) for caption in captions]
    joined = [f" {' '.join(words)} " for words in texts]
    words, found, start = texts[0], [], 0
    while start < len(words):
        end = start
        while end < len(words) and words[end] != "," and _in_all(words[start : end + 1], joined):
            end += 1
        phrase = _without_stopwords(words[start:end])
        if phrase:
            found.append(" ".join(phrase))
        start = max(end, start + 1)
    return list(dict.fromkeys(found))


def _in_all(run: Sequence[str], texts: Sequence[str]) -> bool:
    return all(f" {' '.join(run)} " in text for text in texts)


def _words(caption: str, trigger: str) -> list[str]:
    """Lower-case words and the commas that part phrases; the trigger parts them too."""
    return re.findall(r"[\w'-]+|,", re.sub(r"[.;:!?]", ",", caption.replace(trigger, ",")).lower())


def _without_stopwords(words: list[str]) -> list[str]:
    """The run without the stopwords at its ends."""
    kept = [place for place, word in enumerate(words) if word not in STOPWORDS]
    return words[kept[0] : kept[-1] + 1] if kept else []


def _errors(found: Findings, root: Path, captions_needed: bool) -> list[str]:
    errors = [*found.unreadable.values(), *found.unmasked.values()]
    if found.caption_files:
        errors.append(found.caption_files)
    elif captions_needed and not found.captions:
        errors.append(f"no captions in {root}: run stage=caption first")
    elif captions_needed and found.uncaptioned:
        errors.append(missing_captions(found.uncaptioned, root))
    errors += [missing_picture(name, root, found.uncaptioned) for name in found.pictureless]
    if found.same_name:
        errors.append(same_name_twice(found.same_name, root))
    return errors


def _warnings(found: Findings, trigger: str, captions_needed: bool) -> list[str]:
    warnings = []
    if found.uncaptioned and not captions_needed:
        warnings.append(f"{len(found.uncaptioned)} pictures have no caption yet ({list_names(found.uncaptioned)})")
    if found.enlarged:
        worst = max(found.enlarged, key=found.enlarged.__getitem__)
        warnings.append(
            f"{len(found.enlarged)} pictures would be enlarged, {worst} {found.enlarged[worst]:.1f} times: "
            "the LoRA learns the blur too; find larger ones or lower the resolution"
        )
    for copy, original in found.duplicates:
        warnings.append(f"{copy} is the same picture as {original}: it counts twice; keep the larger file")
    if found.without_trigger:
        names = list_names(found.without_trigger)
        warnings.append(f"{len(found.without_trigger)} captions do not say {trigger} ({names}): run stage=refine")
    for name, tokens in found.too_long.items():
        warnings.append(f"the caption of {name} is {tokens} tokens: CLIP reads {CLIP_WINDOW}, so shorten it")
    for phrase in found.in_every_caption:
        warnings.append(
            f'"{phrase}" is in {found.captions} of {found.captions} captions: it will be learnt as part of {trigger}; '
            "add pictures that show something else there"
        )
    if found.unsupported:
        warnings.append(
            f"{len(found.unsupported)} files are not read ({list_names(found.unsupported)}): convert them to PNG"
        )
    for names in found.same_but_case:
        warnings.append(f"{' and '.join(names)} are one file on Windows and macOS: rename one")
    return warnings


def report(result: CheckResult, root: Path) -> str:
    """The result as lines to read: counts, then errors, then warnings."""
    found = result.findings
    buckets = ", ".join(f"{shape} ({count})" for shape, count in found.buckets.items())
    lines = [f"{root}: {found.pictures} pictures, {found.captions} captions", f"buckets: {buckets or 'none'}"]
    lines += [f"error:   {line}" for line in result.errors]
    lines += [f"warning: {line}" for line in result.warnings]
    verdict = f"training would refuse this folder: {len(result.errors)} to mend" if result.errors else "nothing to mend"
    return "\n".join([*lines, verdict])
