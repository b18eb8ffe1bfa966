"""What the jobs of a sweep share that one process runs one after the other.

Imports nothing heavy: the process of a sweep has it before a job needs a model."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Shared:
    """The base that was loaded last, and all captions of photos; a run that is no job of a sweep has its own."""

    captions: dict[tuple[str, ...], list[str]] = field(default_factory=dict)  # of photos captioned together, by hashes
    _base: tuple[object, Any] | None = None  # what decides it, and the base

    @contextmanager
    def base(self, key: object, load: Callable[[], T]) -> Iterator[T]:
        """Within the context what `load` returned for `key`, now or in an earlier job.

        At most one is in memory. An error within the context frees it, because it may have left it in any state."""
        if self._base is None or self._base[0] != key:
            self.free()
            self._base = (key, load())
        try:
            yield self._base[1]
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Forget the base, so that another model has its memory."""
        if self._base is not None:
            self._base = None
            gc.collect()  # networks and their hooks refer to each other
