"""Images and tables as objects of W&B, or of trackio, whose classes have the same names."""

from types import ModuleType
from typing import Any

from lora_lab.track.base import Pictures, Rows


def images_of(library: ModuleType, pictures: Pictures) -> dict[str, Any]:
    """`pictures` as the library's images with captions."""
    return {key: library.Image(picture, caption=caption) for key, (picture, caption) in pictures.items()}


def table_of(library: ModuleType, rows: Rows) -> Any:
    """`rows`, which have the same columns, as the library's table; cells may be images."""
    from PIL.Image import Image

    columns = list(rows[0])
    cells = [[library.Image(row[c]) if isinstance(row[c], Image) else row[c] for c in columns] for row in rows]
    return library.Table(columns=columns, data=cells)
