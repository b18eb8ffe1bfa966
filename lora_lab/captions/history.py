"""The author of each caption: captions.history.jsonl in the dataset folder, one row for each change by the program.

The file is only appended to, so it also keeps the captioner's own captions after they were refined.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_lab.captions.files import HISTORY, read_captions, write_captions
from lora_lab.console import say
from lora_lab.errors import InputError

ROW = ("file_name", "text", "by", "was")
REFINE = "refine"  # the author of a refined caption; any other author captioned the image itself


@dataclass
class CaptionUpdate:
    """New captions of a folder, which are written as they come, each after its row in the journal.

    So a kill loses nothing. What somebody else changes in the meantime stays."""

    root: Path
    by: str  # the author, as in `record`
    before: Mapping[str, str]  # the captions when the update began; those that were written since, as written
    follow_links: bool = False
    _own: dict[Path, bytes] = field(default_factory=dict)  # what was written, of which no backup is needed

    def add(self, captions: Mapping[str, str], left_out: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
        """Write these captions, unless the image has got another one meanwhile; returns those that were written.
        `left_out`, by image, are phrases for the journal only.

        Raises InputError where the caption files cannot be read any more, and as write_captions()."""
        current = read_captions(self.root, self.follow_links)
        changed = [name for name in captions if current.get(name) != self.before.get(name)]
        for name in changed:
            say(f"{name} has got another caption meanwhile, which is kept")
        new = {name: text for name, text in captions.items() if name not in changed}
        if any(text != current.get(name) for name, text in new.items()):
            record(self.root, self.by, current, new, left_out)
            paths = write_captions(self.root, current | new, own=self._own)
            self._own = {path: path.read_bytes() for path in paths}
        self.before = {**self.before, **new}
        return new

    @property
    def place(self) -> Path:
        """The caption file that was written, the first of several; the folder if none was."""
        return next(iter(self._own), self.root)


def record(
    root: Path,
    by: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Append a row for each caption of `after` that differs from `before`; returns the number of rows.

    `by`, the author, is REFINE (or begins with "refine:") for a refined caption, else the captioner's name; `left_out`
    has what the captioner left out of an image's caption. A row that is the image's last one already is not repeated: a
    kill came between the journal and the caption file.
    Raises InputError if the journal is a link, or its folder lies elsewhere."""
    path = Path(root) / HISTORY
    last = {row["file_name"]: row for row in read_rows(path, ROW)}
    rows = [
        {"file_name": name, "text": text, "by": by, "was": before.get(name, "")}
        | ({"left_out": [*left_out[name]]} if left_out and left_out.get(name) else {})
        for name, text in after.items()
        if text != before.get(name, "")
    ]
    rows = [row for row in rows if row != last.get(row["file_name"])]
    if not rows:
        return 0
    append_rows(path, rows)
    return len(rows)


def machine_made(root: Path) -> dict[str, set[str]]:
    """Image name -> the texts that a captioner wrote, or that refining made of such texts.

    A caption may be replaced only if it equals one of these; any other was written by a person."""
    machine_texts: dict[str, set[str]] = {}
    for row in read_rows(Path(root) / HISTORY, ROW):
        texts = machine_texts.setdefault(row["file_name"], set())
        if row["by"].split(":")[0] != REFINE or row["was"] in texts:
            texts.add(row["text"])
    return {name: texts for name, texts in machine_texts.items() if texts}


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append the rows to a file of JSON lines, which is created. Raises InputError for a link."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # after a crash in the last line: start a new one
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        raise InputError(f"{path}: cannot be written to ({error.strerror}): it must be a file of yours") from error
    with file:
        file.write((b"\n" if torn else b"") + lines.encode())


def read_rows(path: Path, keys: Sequence[str]) -> Iterator[dict[str, str]]:
    """The complete rows of a file of JSON lines that have texts for `keys`; a line that a crash cut off is skipped."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or cut inside a character
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys):
            yield row
