"""The interface of trackers: three functions whose errors never end a training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lab.console import cut
from lora_lab.errors import InputError
from lora_lab.runs import LONGEST_NAME

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Pictures = Mapping[str, "tuple[Image, str]"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Track:
    """The open track of a run. None of its functions raises an exception."""

    numbers: Callable[[int, Mapping[str, float]], None]  # step, {"train/loss": 0.1}
    images: Callable[[int, Pictures], None]  # step, {"validation/<prompt id>": (image, caption)}
    table: Callable[[int, Rows], None]  # step, rows with the same columns, some of them images; TensorBoard has none


NO_TRACK = Track(lambda step, values: None, lambda step, pictures: None, lambda step, rows: None)


def log_errors(numbers: Callable[..., None], images: Callable[..., None], table: Callable[..., None]) -> Track:
    """A Track of functions that may raise: their first error is logged as a warning, later ones are dropped."""
    warned = False

    def catch_errors(function: Callable[..., None]) -> Callable[..., None]:
        def call(step: int, values: Mapping[str, Any]) -> None:
            nonlocal warned
            try:
                function(step, values)
            except Exception as error:  # trackers raise anything: a full disk, a dead process, a closed socket
                if not warned:
                    log.warning("tracking failed at step %d, the run continues: %s", step, first_line(error))
                warned = True

        return call

    return Track(catch_errors(numbers), catch_errors(images), catch_errors(table))


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def validate_name(key: str, name: str | None, forbidden: str = "", longest: int = LONGEST_NAME) -> None:
    """Raise InputError, naming `key`, for a name that is empty or longer than `longest`, or has a letter that cannot be
    printed or is in `forbidden`; None is no name."""
    if name is None:
        return
    if not name.strip():
        raise InputError(f"{key}={cut(name, 40)}: is empty, name it or leave the key out")
    if len(name) > longest:
        raise InputError(f"{key}={cut(name, 40)}: has {len(name)} characters, use at most {longest}")
    odd = [letter for letter in name if letter in forbidden or not letter.isprintable()]
    if odd:
        raise InputError(f"{key}={cut(name, 40)}: may not hold {odd[0]!r}, use another name")
