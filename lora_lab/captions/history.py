"""The author of each caption: captions.history.jsonl in the dataset folder, one row for each change by the program.

The file is only appended to, so it also keeps the captioner's own captions after they were refined.
"""

import json
from collections.abc import Iterator
from pathlib import Path

NAME = "captions.history.jsonl"
REFINE = "refine"  # the author of a refined caption; any other author captioned the image itself


def record(root: Path, by: str, before: dict[str, str], after: dict[str, str]) -> int:
    """Append a row for each caption of `after` that differs from `before`; returns the number of rows.

    `by`, the author, is REFINE (or begins with "refine:") for a refined caption, else the captioner's name."""
    rows = [
        {"file_name": name, "text": text, "by": by, "was": before.get(name, "")}
        for name, text in after.items()
        if text != before.get(name, "")
    ]
    if not rows:
        return 0
    path = Path(root) / NAME
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # after a crash in the last line: start a new one
    with path.open("ab") as file:
        file.write((b"\n" if torn else b"") + lines.encode())
    return len(rows)


def machine_made(root: Path) -> dict[str, set[str]]:
    """Image name -> the texts that a captioner wrote, or that refining made of such texts.

    A caption may be replaced only if it equals one of these; any other was written by a person."""
    machine_texts: dict[str, set[str]] = {}
    for row in _rows(Path(root) / NAME):
        texts = machine_texts.setdefault(row["file_name"], set())
        if row["by"].split(":")[0] != REFINE or row["was"] in texts:
            texts.add(row["text"])
    return {name: texts for name, texts in machine_texts.items() if texts}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The complete rows; a line that a crash cut off is skipped."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or cut inside a character
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file_name", "text", "by", "was")):
            yield row
