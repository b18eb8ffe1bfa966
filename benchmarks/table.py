"""A table of figures, as JSON for programs and as Markdown for readers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def write_table(file: Path, machine: dict, rows: Sequence[dict], head: Sequence, lines: Sequence[Sequence]) -> None:
    """`file`.json of `rows`, `file`.md of `lines`, each below the command and the machine; printed as well."""
    table = {"command": " ".join(sys.argv[1:]), "machine": machine, "rows": rows}
    file.with_suffix(".json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    drawn = [f"| {' | '.join(map(str, line))} |" for line in (head, *lines)]
    drawn.insert(1, "|" + "---|" * len(head))
    text = "\n".join([", ".join(f"{name} {value}" for name, value in machine.items()), "", *drawn]) + "\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, flush=True)
