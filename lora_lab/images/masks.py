"""Masks of a masked loss: the alpha channel of each image, or a mask image of the same name. White is trained on."""

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
