"""What a tracker is to a training: three functions, and none of them costs it anything when they fail."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Pictures = Mapping[str, "tuple[Image, str]"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Track:
    """Where a run's numbers and images go. No function ever raises: a tracker must not cost a training."""

    numbers: Callable[[int, Mapping[str, float]], None]  # step, {"train/loss": 0.1}
    images: Callable[[int, Pictures], None]  # step, {"validation/<prompt id>": (picture, caption)}
    table: Callable[[int, Rows], None]  # step, rows of one set of columns, pictures among them; not TensorBoard's


NOTHING = Track(lambda step, values: None, lambda step, pictures: None, lambda step, rows: None)


def forgiving(numbers: Callable[..., None], images: Callable[..., None], table: Callable[..., None]) -> Track:
    """Functions that may raise, as a Track: of all their failures the first is a warning."""
    warned = False

    def forgive(function: Callable[..., None]) -> Callable[..., None]:
        def call(step: int, values: Mapping[str, Any]) -> None:
            nonlocal warned
            try:
                function(step, values)
            except Exception as error:  # whatever a tracker may raise: a full disk, a dead process, a closed socket
                if not warned:
                    log.warning("tracking failed at step %d, the run goes on: %s", step, line(error))
                warned = True

        return call

    return Track(forgive(numbers), forgive(images), forgive(table))


def line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
