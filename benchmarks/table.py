"""A table of figures, as JSON for programs and as Markdown for readers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def write_table(file: Path, machine: dict, rows: Sequence[dict], head: Sequence, lines: Sequence[Sequence]) -> None:
    """Write `rows` as `file`.json, and `lines` under `head` as `file`.md, with the command and the machine; print the
    latter."""
    table = {"command": " ".join(sys.argv[1:]), "machine": machine, "rows": rows}
    file.with_suffix(".json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    table_lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *lines)]
    table_lines.insert(1, "|" + "---|" * len(head))
    text = "\n".join([", ".join(f"{name} {value}" for name, value in machine.items()), "", *table_lines]) + "\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, flush=True)
