"""What of each picture is learnt: its own alpha channel, or a mask picture of the same name. White is learnt."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from lora_lab.base.locate import locate_folder
from lora_lab.errors import InputError
from lora_lab.images.buckets import Size
from lora_lab.images.pixels import open_picture, open_with_alpha
from lora_lab.images.scan import find_pictures


@dataclass(frozen=True)
class Masks:
    """Where masks come from: a folder and its `files` by name without suffix; without a folder, the alpha channels."""

    folder: Path | None
    files: dict[str, Path]

    def file(self, name: str) -> Path:
        """The mask picture of the picture `name`. Raises InputError if there is none."""
        found = self.files.get(_stem(name))
        if found is None:
            raise InputError(f"{self.folder} has no mask for {name}: add {_stem(name)}.png, white where it is learnt")
        return found

    def open(self, name: str, path: Path, size: Size) -> Image.Image:
        """The mask of the picture `name`, which lies at `path` and is upright of `size`: grey, 255 is learnt.

        Raises InputError, naming the file, for one that is missing, of another size, or black all over."""
        if self.folder is None:
            source, (_, mask) = path, open_with_alpha(path)
            if mask is None:
                raise InputError(
                    f"{path} has no alpha channel, which loss.mask=alpha asks of every picture: cut it out"
                )
        else:
            source = self.file(name)
            mask = open_picture(source, background=(0, 0, 0)).convert(
                "L"
            )  # what a mask leaves transparent is not meant
        if mask.size != size:
            sizes = f"{source} is {mask.width}x{mask.height}, but {name} is {size[0]}x{size[1]}"
            raise InputError(f"{sizes}: a mask has its picture's size")
        if mask.getbbox() is None:
            what = "transparent" if self.folder is None else "black"
            raise InputError(f"{source} is {what} all over, nothing of {name} would be learnt: take the picture out")
        return mask


def find_masks(mask: str) -> Masks | None:
    """What `loss.mask` means: None for none. Raises InputError for a folder without pictures or with an unclear one."""
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
