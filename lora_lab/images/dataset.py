"""A dataset folder as training reads it: images, captions and masks, or one sentence about what is wrong.

A mask is the alpha channel of an image, or a mask image of the same name. White is trained on."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from PIL import Image

from lora_lab.base.locate import locate_folder
from lora_lab.captions.files import caption_files, read_caption_lists
from lora_lab.console import printable, say
from lora_lab.errors import InputError
from lora_lab.images.pixels import Fitted, Size, count_frames, cut_away, open_picture, open_with_alpha
from lora_lab.images.scan import Contents, find_contents, find_pictures, natural_key, scan
from lora_lab.settings.sections import Triggers

NO_USE = "neither an image nor a caption file that is read: move it elsewhere"
MOST_CUT_AWAY = 0.25  # of an image's pixels, before the user is warned
KOHYA_FOLDER = re.compile(r"([1-9]\d{0,2})_.+")  # repeats_name; 2024_05 is a date


@dataclass(frozen=True)
class Masks:
    """The source of masks: a folder of mask images, or the alpha channels."""

    folder: Path | None  # None: the alpha channels
    files: dict[str, Path]  # name without suffix -> mask image

    def file(self, name: str) -> Path:
        """The mask image of the image `name`. Raises InputError if there is none."""
        file = self.files.get(_stem(name))
        if file is None:
            raise InputError(f"{self.folder} has no mask for {name}: add {_stem(name)}.png, white where it is learnt")
        return file

    def open(self, name: str, path: Path, size: Size) -> Image.Image:
        """The mask (mode L, 255 is trained on) of the image `name` at `path`, upright of `size` (width, height).

        Raises InputError, naming the file, for a mask that is missing, of another size, or completely black."""
        if self.folder is None:
            source, (_, mask) = path, open_with_alpha(path)
            if mask is None:
                raise InputError(
                    f"{path} has no alpha channel, which loss.mask=alpha requires of every picture: cut the subject out"
                )
        else:
            source = self.file(name)
            mask = open_picture(source, background=(0, 0, 0)).convert("L")  # transparent counts as black
        if mask.size != size:
            sizes = f"{source} is {mask.width}x{mask.height}, but {name} is {size[0]}x{size[1]}"
            raise InputError(f"{sizes}: a mask has its picture's size")
        if mask.getbbox() is None:
            colour = "transparent" if self.folder is None else "black"
            raise InputError(f"{source} is {colour} all over, nothing of {name} would be learnt: remove the picture")
        return mask


def find_masks(mask: str) -> Masks | None:
    """The masks of `loss.mask` (none, alpha or a folder); None for none.

    Raises InputError for a folder that does not exist, has no images, or has two masks of one name."""
    if mask in ("none", "alpha"):
        return Masks(None, {}) if mask == "alpha" else None
    folder = locate_folder("loss.mask", mask)
    if not folder.is_dir():
        raise InputError(f"loss.mask={mask}: this is a file, name none, alpha or a folder of mask pictures")
    files: dict[str, Path] = {}
    for name, path in find_pictures(folder, "loss.mask").items():
        other = files.setdefault(_stem(name), path)
        if other != path:
            raise InputError(f"{folder} has two masks of one name, {other.name} and {path.name}: remove one")
    return Masks(folder, files)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


@dataclass(frozen=True)
class Sample:
    name: str  # relative to the dataset folder, POSIX, NFC; with several folders it begins with the folder's name
    path: Path
    captions: tuple[str, ...]  # at least one
    repeats: int = 1  # occurrences in an epoch


def read_folders(
    folders: Sequence[tuple[Path, int]], follow_links: bool = False, kohya_folders: bool = False
) -> list[Sample]:
    """The samples of several (folder, repeats), folder by folder. With `kohya_folders` the repeats of a subfolder such
    as 10_tofu multiply those of its folder.

    Raises InputError for a folder that `read_dataset` refuses, two folders of one name, and an image in two folders."""
    roots = [root for root, _ in folders]
    require_distinct_names(roots)
    samples: list[Sample] = []
    for root, repeats in folders:
        prefix = folder_prefix(root, roots)
        for s in read_dataset(root, follow_links):
            times = folder_repeats(s.name, root) if kohya_folders else 1
            samples.append(replace(s, name=prefix + s.name, repeats=repeats * times))
    if len(roots) == 1:
        return samples
    names_by_path: dict[Path, str] = {}
    for sample in samples:
        other = names_by_path.setdefault(sample.path.resolve(), sample.name)
        if other is not sample.name:
            raise InputError(f"{other} is also {sample.name}: name every folder once, and none inside another")
    return samples


def require_distinct_names(roots: Sequence[Path]) -> None:
    """Raise InputError for different folders of one name, because their images would have equal names."""
    paths: dict[str, Path] = {}
    for path in (root.resolve() for root in roots):
        if paths.setdefault(path.name, path) != path:
            raise InputError(
                f"two folders of dataset.root are called {path.name}: rename one, pictures are told apart by it"
            )


def folder_prefix(root: Path, roots: Sequence[Path]) -> str:
    """The beginning of the names of images in `root`: "" if it is the only folder, else its name and a slash."""
    return f"{root.resolve().name}/" if len(roots) > 1 else ""


def folder_repeats(name: str, root: Path) -> int:
    """The repeats in kohya's name of the innermost folder that has one, for the image `name` in `root`; else 1."""
    folders = [root.resolve().name, *PurePosixPath(name).parts[:-1]]
    return next((int(match[1]) for f in reversed(folders) if (match := KOHYA_FOLDER.fullmatch(f))), 1)


def read_dataset(root: Path, follow_links: bool = False) -> list[Sample]:
    """Every image under `root` with its captions, in natural order.

    Raises InputError unless every image has a caption and every caption an image."""
    contents, captions = _images(root, follow_links), read_caption_lists(root, follow_links)
    paths = contents.images
    uncaptioned = [name for name in paths if name not in captions]
    pictureless = [name for name in captions if name not in paths]
    faults = unmatched_captions(pictureless, uncaptioned, root, contents.left_out)
    faults += missing_captions(uncaptioned, len(paths), root)
    if faults:
        raise InputError(faults[0])
    return [Sample(name, path, captions[name]) for name, path in paths.items()]


def require_trigger(texts: Mapping[str, Iterable[str]], triggers: Triggers) -> None:
    """Raise InputError for a trigger that no text of its images has: no step would train it. `texts` has the texts of
    each image by its name."""
    for trigger, names in triggers.names_by_trigger(texts).items():
        if not any(trigger in text for name in names for text in texts[name]):
            raise InputError(
                f"no caption of the {len(names)} pictures has the trigger {trigger}: "
                f"run stage=refine to put it in, or name yours with trigger="
            )


def apply_caption_affixes(caption: str, prefix: str, suffix: str, trigger: str) -> str:
    """The caption with `dataset.caption_prefix` and `_suffix`, joined by spaces, without a space before a comma.

    {trigger} in them stands for the trigger."""
    text = caption
    if prefix:
        text = f"{prefix} {text}"
    if suffix:
        text = f"{text}{'' if suffix.startswith(',') else ' '}{suffix}"
    return text.replace("{trigger}", trigger) if prefix or suffix else text


def unused_files(root: Path, follow_links: bool = False) -> dict[str, str]:
    """Name -> what it is and what to do, of every file or folder in a dataset folder that no stage reads.

    Raises InputError as `scan` does."""
    contents = scan(root, follow_links)
    in_use = caption_files(root, contents.others.values(), follow_links)
    others = {printable(name): NO_USE for name, path in contents.others.items() if path not in in_use}
    unused = contents.left_out | others
    return {name: unused[name] for name in sorted(unused, key=natural_key)}


def unused_line(roots: Sequence[Path], follow_links: bool = False) -> str:
    """One line about the files in the dataset folders that no stage reads; "" if there are none."""
    names = [folder_prefix(root, roots) + name for root in roots for name in unused_files(root, follow_links)]
    where = ", ".join(map(str, roots))
    return f"{len(names)} in {where} not used: {list_names(names)} (stage=check says why)" if names else ""


def say_unused(roots: Sequence[Path], follow_links: bool = False) -> None:
    """Print the line of `unused_line`, if there is anything to say."""
    if line := unused_line(roots, follow_links):
        say(line)


def frames_line(paths: Mapping[str, Path]) -> str:
    """One line about the images by name of which only the first frame is used; "" if there are none."""
    frames = {name: count for name, path in paths.items() if (count := count_frames(path)) > 1}
    names = list_names([f"{name} ({count})" for name, count in frames.items()])
    return f"of {names} the first is used" if frames else ""


def cut_away_line(images: Mapping[str, Fitted]) -> str:
    """One line about the images by name of which their bucket cuts too much away; "" if there are none."""
    shares = {name: cut_away(image.original_size[::-1], image.target_size[::-1]) for name, image in images.items()}
    names = [f"{share:.0%} of {name}" for name, share in shares.items() if share > MOST_CUT_AWAY]
    return f"away by the buckets: {list_names(names)} (stage=check says more)" if names else ""


def copy_pictures(root: Path, to: Path, follow_links: bool = False) -> int:
    """Copy the images under `root`, without their captions, into the new folder `to`; returns their number.

    Raises InputError for a folder without images, two files of one name, and if `to` is not empty."""
    paths = _images(root, follow_links).images
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} exists already: name a new folder")
    for name, path in paths.items():
        copy = to / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return len(paths)


def unmatched_captions(
    pictureless: Sequence[str], uncaptioned: Sequence[str], root: Path | str, left_out: Mapping[str, str]
) -> list[str]:
    """A sentence for each of the first ten captions without an image, and one for the others.

    It gives the reason in `left_out` (of `Contents`), or suggests an uncaptioned image with a similar name."""
    sentences = []
    for name in pictureless[:10]:  # comparing all names with all would be quadratic
        places = [name, *(f"{folder}/" for folder in PurePosixPath(name).parents)]
        reason = next((left_out[place] for place in places if place in left_out), None)
        similar = get_close_matches(name, uncaptioned, n=1, cutoff=0.7)
        hint = f"was {similar[0]} meant?" if similar else "put it back or delete the caption"
        fault = f"which is {reason}" if reason else f"but no such picture in {root}: {hint}"
        sentences.append(f"there is a caption for {name}, {fault}")
    if others := pictureless[10:]:
        sentences.append(f"there are captions for {list_names(others)}, but no such pictures in {root}")
    return sentences


def missing_captions(uncaptioned: Sequence[str], count: int, root: Path | str) -> list[str]:
    """The sentence for images without a caption, of `count` images; [] if every image has one."""
    if len(uncaptioned) == count:
        return [f"no captions in {root}: run stage=caption first"]
    names = list_names(uncaptioned)
    sentence = f"{len(uncaptioned)} of the {count} pictures in {root} have no caption ({names}): run stage=caption"
    return [f"{sentence}, or remove them"] if uncaptioned else []


def same_name_twice(names: Sequence[str], root: Path | str) -> str:
    """The sentence for files whose names are equal in Unicode."""
    return (
        f"{list_names(names)} is in {root} twice, its letters composed (NFC) and decomposed (NFD): rename or remove one"
    )


def list_names(names: Sequence[str], most: int = 3) -> str:
    """'a.png, b.png, c.png and 4 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _images(root: Path, follow_links: bool) -> Contents:
    """The contents of a folder with images. Raises InputError for one without, and for two images of one name."""
    contents = find_contents(root, follow_links=follow_links)
    if contents.same_name:
        raise InputError(same_name_twice(contents.same_name, root))
    return contents
