"""TensorBoard: event files in the run folder."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lab.settings.schema import Tracker
from lora_lab.track.base import Pictures, Track, first_line, log_errors

log = logging.getLogger(__name__)


@contextmanager
def open_track(folder: Path, name: str, config: Mapping[str, Any], resume: bool, settings: Tracker) -> Iterator[Track]:
    """Within the context write event files into the folder tensorboard of the run folder; it has no settings."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def writer(step: int) -> SummaryWriter:
        if not writers:  # opened at the first step: from that one on a resumed run hides what the killed one wrote
            writers.append(SummaryWriter(folder / "tensorboard", purge_step=step if resume else None))
            text = json.dumps({"name": name, **config}, ensure_ascii=False, indent=2, default=str)
            writers[0].add_text("config", f"```json\n{text}\n```", step)
        return writers[0]

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer(step).add_scalar(key, value, step)

    def images(step: int, pictures: Pictures) -> None:
        for key, (picture, caption) in pictures.items():
            writer(step).add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            writer(step).add_text(f"{key}/caption", caption, step)
        writer(step).flush()  # otherwise images appear two minutes later

    try:
        yield log_errors(numbers, images, lambda step, rows: None)
    finally:
        for summary_writer in writers:
            try:
                summary_writer.close()
            except Exception as error:
                log.warning("tracking could not be closed: %s", first_line(error))
