"""TensorBoard: event files in the run folder."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lab.track.base import Pictures, Track, forgiving, line

log = logging.getLogger(__name__)


@contextmanager
def tracked(folder: Path, config: Mapping[str, Any], resume: bool) -> Iterator[Track]:
    """Track a run into `folder`/tensorboard."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def writer(step: int) -> SummaryWriter:
        if not writers:  # opened at the first step: a resumed run hides what the killed one wrote from that step on
            writers.append(SummaryWriter(folder / "tensorboard", purge_step=step if resume else None))
            text = json.dumps(config, ensure_ascii=False, indent=2, default=str)
            writers[0].add_text("config", f"```json\n{text}\n```", step)
        return writers[0]

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer(step).add_scalar(key, value, step)

    def images(step: int, pictures: Pictures) -> None:
        for key, (picture, caption) in pictures.items():
            writer(step).add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            writer(step).add_text(f"{key}/caption", caption, step)
        writer(step).flush()  # two minutes otherwise: too long for a person who waits for a picture

    try:
        yield forgiving(numbers, images, lambda step, rows: None)
    finally:
        for opened in writers:
            try:
                opened.close()
            except Exception as error:
                log.warning("tracking could not be closed: %s", line(error))
