"""Which image a name in a caption file means."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from lora_lab.console import cut, say_once
from lora_lab.errors import InputError


@dataclass(frozen=True)
class ImageNames:
    """The images of a folder, found by the names that people and other programs write for them."""

    paths: Mapping[str, Path]  # by name: relative to the folder, with "/", in NFC

    def find(self, value: object, where: str, folder: str = "") -> str:
        """The name of the image that `value` names in a caption file, which lies in `folder`, relative to the images'.

        It may be relative to either folder, without its suffix, or a path of another computer. A name without an image
        is returned as it is. Raises InputError, beginning with `where`, for what is no name, leads out of the folder,
        or fits several images."""
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f'{where}: the file name is {cut(value)}: write the picture\'s name, such as "image_1.png"'
            )
        path = PurePosixPath(unicodedata.normalize("NFC", value.strip()).replace("\\", "/"))
        require_utf8(str(path), where)
        if path.is_absolute() or path.parts[:1] == () or path.parts[0].endswith(":"):
            return self._of_another_computer(path, value, where)
        if ".." in path.parts:
            raise InputError(f"{where}: {cut(value)} is not inside the dataset folder: write the path relative to it")
        candidates = [str(PurePosixPath(folder, path)), str(path)]  # PurePosixPath has dropped "./"
        for name in candidates:
            if name in self.paths:
                return name
        for name in candidates:
            if found := self._without_suffix.get(name):
                return _only(found, value, where)
        return candidates[0]

    @cached_property
    def _without_suffix(self) -> dict[str, list[str]]:
        return _grouped((str(PurePosixPath(name).with_suffix("")), name) for name in self.paths)

    @cached_property
    def _by_file_name(self) -> dict[str, list[str]]:
        """Names of images by their last part, with and without its suffix."""
        files = [(PurePosixPath(name), name) for name in self.paths]
        return _grouped(pair for path, name in files for pair in ((path.name, name), (path.stem, name)))

    def _of_another_computer(self, path: PurePosixPath, value: str, where: str) -> str:
        """The image that has most of the path's last parts."""
        names = self._by_file_name.get(path.name, [])
        if not names:
            raise InputError(f"{where}: {cut(value)} is not inside the dataset folder: write the path relative to it")
        folders = path.parts[-2::-1]
        shared = {name: _shared(folders, PurePosixPath(name).parts[-2::-1]) for name in names}
        found = [name for name in names if shared[name] == max(shared.values())]
        say_once("pictures that captions name by paths of another computer are found by their file names")
        return _only(found, value, where)


def require_utf8(name: str, where: str) -> None:
    """Raise InputError, beginning with `where`, for a file name that is not UTF-8: no caption file can have it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the file name {cut(name)} is not UTF-8: rename the picture") from None


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, name in pairs:
        if name not in groups[key]:
            groups[key].append(name)
    return dict(groups)


def _shared(parts: tuple[str, ...], others: tuple[str, ...]) -> int:
    """The number of first parts that are equal."""
    count = 0
    while count < min(len(parts), len(others)) and parts[count] == others[count]:
        count += 1
    return count


def _only(names: list[str], value: str, where: str) -> str:
    if len(names) > 1:
        raise InputError(f"{where}: {cut(value)} may be {names[0]} or {names[1]}: write the whole name")
    return names[0]
