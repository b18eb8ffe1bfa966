"""Pictures and tables in the words of W&B, which trackio has too."""

from types import ModuleType
from typing import Any

from lora_lab.track.base import Pictures, Rows


def pictures_of(library: ModuleType, pictures: Pictures) -> dict[str, Any]:
    return {key: library.Image(picture, caption=caption) for key, (picture, caption) in pictures.items()}


def table_of(library: ModuleType, rows: Rows) -> Any:
    """Rows of one set of columns; what is a picture is shown as one."""
    from PIL.Image import Image

    columns = list(rows[0])
    cells = [[library.Image(row[c]) if isinstance(row[c], Image) else row[c] for c in columns] for row in rows]
    return library.Table(columns=columns, data=cells)
