"""Proposed captions: metadata.proposed.jsonl, which no stage reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lab.captions.captioner import Settings
from lora_lab.runs import hash_content, hash_text, write_text

DECIDE_NOTHING = ("name", "batch_size", "cache", "key_file", "retries", "timeout")  # keys of the captioner


@dataclass
class Proposals:
    """The captions in a file, which is written after each batch, so that a killed run goes on where it was."""

    place: Path  # the file
    hashes: Mapping[str, str]  # image name, in order -> what decides its caption: content, hint, and the captioner
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # by image name

    @property
    def captions(self) -> dict[str, str]:
        """Image name -> caption, in the order of the images."""
        return {name: self.rows[name]["text"] for name in self.hashes if name in self.rows}

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Image name -> the phrases that were left out of its caption as uncertain."""
        return {name: row["left_out"] for name, row in self.rows.items() if "left_out" in row}

    def add(self, captions: Mapping[str, str], left_out: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Write these captions beside the others, with `left_out` by image; returns them."""
        for name, text in captions.items():
            row = {"file_name": name, "text": text, "hash": self.hashes[name]}
            self.rows[name] = row | ({"left_out": [*left_out[name]]} if left_out.get(name) else {})
        lines = (json.dumps(self.rows[name], ensure_ascii=False) for name in self.hashes if name in self.rows)
        write_text(self.place, "".join(f"{line}\n" for line in lines))
        return dict(captions)


def read_proposals(file: Path, paths: Mapping[str, Path], hints: Mapping[str, str], settings: Settings) -> Proposals:
    """The proposals in `file` that this captioner wrote for the present images and hints; maybe none.

    `paths` has the file of each image. Those of other settings, or of an image or hint that has changed, are left out,
    and so are lines that are damaged."""
    captioner = json.dumps({k: v for k, v in sorted(settings.items()) if k not in DECIDE_NOTHING}, default=str)
    hashes = {n: hash_text(f"{captioner}\n{hints.get(n, '')}\n{hash_content(p)}")[:16] for n, p in paths.items()}
    rows = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            if isinstance(row["text"], str) and row["hash"] == hashes[row["file_name"]]:
                rows[row["file_name"]] = row
        except (ValueError, RecursionError, LookupError, TypeError):
            continue
    return Proposals(file, hashes, rows)
