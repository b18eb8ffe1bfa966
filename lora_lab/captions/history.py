"""Who wrote a caption: captions.history.jsonl in the dataset folder, one row for each change that the program made.

The journal is only ever appended to, so it also keeps the captioner's raw words after they were refined.
"""

import json
from collections.abc import Iterator
from pathlib import Path

NAME = "captions.history.jsonl"
REFINE = "refine"  # `by` of a change that was made out of the old text; any other writer looked at the picture


def record(root: Path, by: str, before: dict[str, str], after: dict[str, str]) -> int:
    """Append one row for each caption of `after` that is not so in `before`; returns how many.

    `by` is "refine" (or "refine:" and more) for a rewritten caption, else the captioner's name."""
    rows = [
        {"file_name": name, "text": text, "by": by, "was": before.get(name, "")}
        for name, text in after.items()
        if text != before.get(name, "")
    ]
    if not rows:
        return 0
    path = Path(root) / NAME
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # a crash cut the last line: start a new one
    with path.open("ab") as file:
        file.write((b"\n" if torn else b"") + lines.encode())
    return len(rows)


def machine_made(root: Path) -> dict[str, set[str]]:
    """Name -> the texts that are the machine's: a captioner's words, or what refine made out of such words.

    A caption may be replaced only while it is one of these word for word; anything else is a person's."""
    made: dict[str, set[str]] = {}
    for row in _rows(Path(root) / NAME):
        texts = made.setdefault(row["file_name"], set())
        if row["by"].split(":")[0] != REFINE or row["was"] in texts:
            texts.add(row["text"])
    return {name: texts for name, texts in made.items() if texts}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows that are whole; a line torn by a crash says nothing."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or cut inside a letter
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file_name", "text", "by", "was")):
            yield row
