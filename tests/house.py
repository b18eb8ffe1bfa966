"""Measure how the source is built: coupling, complexity, state, docstrings and length, each beside its target.

    python -m tests.house                the table
    python -m tests.house --list         and what is behind each number
    python -m tests.house --static       without the runs of lora_lab, which take a minute or two
    python -m tests.house --root PATH    of another checkout

All but `entered_modules` need only the source, as `read_package` gives it."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutable_state import cached_functions, mutable_variables
from tests.package_source import Definition, Module, definitions, read_package

SDXL_NAMES = re.compile(r"UNet2DConditionModel|text_encoder_2|StableDiffusionXL|time_ids")
TRAINING_LOOP = ("training/trainer.py", "training/loop.py")
# What makes the configuration or unpacks it, and so may take all of it.
CONFIG_MODULES = (
    "stages/", "launch/", "settings/", "config.py", "schema.py", "command_line.py", "job.py", "resume.py",
    "training/resolve.py",
)  # fmt: skip
DIMENSION = r"(?:\*?[A-Za-z]\w{0,11}|\d+|\.\.\.|\*)(?:\s*(?:\*|//|/|\+|-)\s*\w+)*"
SHAPE = re.compile(rf"(?<!\w)\((?:{DIMENSION},|{DIMENSION}(?:, {DIMENSION})+)?\)|\b[Ss]hapes?\b")
RAISES = re.compile(r"\b[Rr]aises?\b")
LONG_FUNCTION, LONG_MODULE = 65, 320  # lines
MOST_COMPLEX, MOST_COMPLEX_LOOP = 10, 8


@dataclass(frozen=True)
class Measure:
    """A number as text, its target, and what it is made of."""

    name: str
    now: str
    target: str
    items: list[str]

    @property
    def holds(self) -> bool:
        """Whether the number meets its target; true of a measure without one."""
        bound = re.fullmatch(r"(<=|>=)? ?(\d+)%?", self.target)
        if not bound:
            return not self.target
        number = int(self.now.rstrip("%")) if self.now.rstrip("%").isdigit() else None  # None: a run failed
        if number is None:
            return False
        return number >= int(bound[2]) if bound[1] == ">=" else number <= int(bound[2])

    @classmethod
    def count(cls, name: str, items: Iterable[str], target: str) -> "Measure":
        items = list(items)
        return cls(name, str(len(items)), target, items)


def entered_modules(checkout: Path) -> list[Measure]:
    """How many modules short runs enter, by tests/module_trace.py: on the bundled tiny base, from empty folders.

    Training counts up to the first optimizer step and up to the LoRA file, turning one photo and a packed sweep of two
    jobs until the process has ended."""
    short = ("device=cpu", "tracker=off", "sampler.steps=2")
    train = ("stage=train", "steps=2", "model.judge=null", *short)
    draw = (
        "stage=img2img",
        "stage.photo=demo:photos/1.png",
        "lora=run",
        "stage.resemblance=false",
        *short,
        "hydra.run.dir=drawn",
    )
    sweep = ("-m", *train, "rank=2,4", "hydra/launcher=packed", "hydra.sweep.dir=sweep")
    files = {"LoRA file": "run/lora/HANA_TOFU.safetensors", "picture": "drawn/*.png", "page": "sweep/index.html"}
    with tempfile.TemporaryDirectory() as folder:
        trained = _trace(checkout, folder, files, *train, "hydra.run.dir=run")
        drawn = _trace(checkout, folder, files, *draw)
    with tempfile.TemporaryDirectory() as folder:
        swept = _trace(checkout, folder, files, *sweep)
    return [
        _entered("argv to first optimizer step", trained, "first optimizer step", 42),
        _entered("argv to LoRA file", trained, "LoRA file", 42),
        _entered("photo to picture", drawn, "picture", 30, to_the_end=True),
        _entered("packed sweep to page", swept, "page", 50, to_the_end=True),
    ]


def _trace(checkout: Path, folder: str, files: dict[str, str], *argv: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("module_trace.py")
    command = [sys.executable, str(program), "trace.json", str(checkout), json.dumps(files), *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {''.join(done.stderr.strip().splitlines()[-1:])}"}
    return json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))


def _entered(name: str, trace: dict, milestone: str, target: int, to_the_end: bool = False) -> Measure:
    name, milestones = f"modules entered, {name}", trace.get("milestones", {})
    if milestone not in milestones:
        return Measure(name, "failed", f"<= {target}", [trace.get("error", f"no {milestone}")])
    return Measure.count(name, trace["entered"][: None if to_the_end else milestones[milestone]], f"<= {target}")


def sdxl_modules(modules: list[Module]) -> Measure:
    """Modules whose source names a class or a key that only SDXL has."""
    paths = [module.path for module in modules if SDXL_NAMES.search(module.source)]
    return Measure.count("modules that name SDXL's classes or keys", paths, "<= 4")


def complexity(checkout: Path) -> list[Measure]:
    """McCabe's complexity, as ruff's C901 counts it: of the worst function, and of the worst in the training loop."""
    package = (checkout / "lora_lab").resolve()
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--no-cache", "--select=C901"]
    command += ["--config=lint.mccabe.max-complexity=0", "--output-format=json", str(package)]
    diagnostics = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    functions: list[tuple[int, str, str]] = []
    for diagnostic in diagnostics:
        name, number = re.match(r"`(.+)` is too complex \((\d+)", diagnostic["message"]).groups()
        path = Path(diagnostic["filename"]).relative_to(package).as_posix()
        functions.append((int(number), path, f"{path}:{diagnostic['location']['row']} {name} {number}"))
    functions.sort(reverse=True)
    loop = [(number, text) for number, path, text in functions if path in TRAINING_LOOP]
    above = [text for number, _, text in functions if number > MOST_COMPLEX]
    above_in_loop = [text for number, text in loop if number > MOST_COMPLEX_LOOP]
    worst_of_loop = str(loop[0][0]) if loop else "no loop"
    return [
        Measure("complexity (C901), worst function", str(functions[0][0]), f"<= {MOST_COMPLEX}", above),
        Measure("complexity (C901), worst of the loop", worst_of_loop, f"<= {MOST_COMPLEX_LOOP}", above_in_loop),
    ]


def module_state(modules: list[Module]) -> list[Measure]:
    return [
        Measure.count("mutable variables of modules and classes", mutable_variables(modules), "0"),
        Measure.count("module functions with a cache", cached_functions(modules), ""),
    ]


def repeated_class_names(modules: list[Module]) -> Measure:
    places = defaultdict(list)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module.path}:{node.lineno}")
    repeated = [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]
    return Measure.count("class names defined more than once", repeated, "0")


def functions_with_config(modules: list[Module]) -> list[Measure]:
    """Functions with a parameter that is a Config, or a collection of them, where no configuration is made."""
    taking = [d for module in modules for d in definitions(module) if d.takes("Config")]
    below = [d.location for d in taking if not d.module.path.startswith(CONFIG_MODULES)]
    exactly = [
        d.location
        for d in taking
        if any(parameter.annotation and ast.unparse(parameter.annotation) == "Config" for parameter in d.parameters)
    ]
    return [
        Measure.count("functions below stages that take Config", below, "0"),
        Measure.count("  of all functions, those annotated `Config`", exactly, ""),
    ]


def docstrings(modules: list[Module]) -> list[Measure]:
    """The shares of public functions that state the shapes of their tensors, and the errors they raise."""
    public = [d for module in modules for d in definitions(module) if d.is_public]
    with_tensors = [d for d in public if d.takes("Tensor") or d.returns("Tensor")]
    raising = [d for d in public if _raises(d)]
    return [
        _share("docstrings with shapes, of those with tensors", with_tensors, SHAPE),
        _share("docstrings with errors, of those that raise", raising, RAISES),
    ]


def _raises(definition: Definition) -> bool:
    """Whether the function raises an error of its own; to raise a caught one again does not count."""
    nodes = list(definition.own_nodes())
    caught = {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc]
    return any(not (isinstance(error, ast.Name) and error.id in caught) for error in raised)


def _share(name: str, functions: list[Definition], pattern: re.Pattern) -> Measure:
    lacking = [d.location for d in functions if not pattern.search(d.docstring)]
    share = 1 - len(lacking) / len(functions) if functions else 1
    return Measure(f"{name} ({len(functions)})", f"{share:.0%}", ">= 90%", lacking)


def sizes(modules: list[Module]) -> list[Measure]:
    lines = sum(module.line_count for module in modules)
    loose = [module.path for module in modules if "/" not in module.path and module.path != "__init__.py"]
    functions = [(d.line_count, d.location) for module in modules for d in definitions(module)]
    long_functions = [f"{place} {count}" for count, place in sorted(functions, reverse=True) if count > LONG_FUNCTION]
    by_length = sorted(modules, key=lambda module: -module.line_count)
    long_modules = [f"{m.path} {m.line_count}" for m in by_length if m.line_count > LONG_MODULE]
    return [
        Measure("lines of Python", str(lines), "", [f"{m.line_count:5} {m.path}" for m in by_length]),
        Measure.count("modules at the top of lora_lab", loose, "<= 5"),
        Measure.count(f"functions of more than {LONG_FUNCTION} lines", long_functions, ""),
        Measure.count(f"modules of more than {LONG_MODULE} lines", long_modules, ""),
    ]


def static_measures(checkout: Path) -> list[Measure]:
    modules = read_package(checkout)
    return [
        sdxl_modules(modules),
        *complexity(checkout),
        *module_state(modules),
        repeated_class_names(modules),
        *functions_with_config(modules),
        *docstrings(modules),
        *sizes(modules),
    ]


def table(measures: list[Measure]) -> str:
    rows = [("measure", "now", "target")] + [(m.name, m.now, m.target) for m in measures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:{widths[0]}} | {now:>{widths[1]}} | {target:>{widths[2]}}" for name, now, target in rows]
    return "\n".join([lines[0], "-|-".join("-" * width for width in widths), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.house", description="Measure how the source is built.")
    parser.add_argument("--list", action="store_true", help="print what is behind each number")
    parser.add_argument("--static", action="store_true", help="leave out the measures that run lora_lab")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="another checkout")
    options = parser.parse_args()
    checkout = options.root.resolve()
    measures = ([] if options.static else entered_modules(checkout)) + static_measures(checkout)
    print(table(measures))
    for measure in measures if options.list else ():
        print(f"\n{measure.name.strip()}: {measure.now}")
        print("\n".join(f"  {item}" for item in measure.items) or "  none")


if __name__ == "__main__":
    main()
