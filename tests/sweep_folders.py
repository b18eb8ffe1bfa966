"""Sweep folders as a sweep leaves them, without the training, for tests of the comparison page."""

import hashlib
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from lora_lab.demo import TOFU

PROMPTS = ["A {trigger} with a green background", "A {trigger}, winking"]
SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def write_sweep(root: Path, swept: Mapping[str, list[Any]], missing: int = 0, **run: Any) -> list[Path]:
    """A sweep over `swept` (key -> values) of which the last `missing` jobs have not begun; returns the run folders."""
    root.mkdir(parents=True)
    task = ["stage=train", *(f"{key}={','.join(map(str, values))}" for key, values in swept.items())]
    record = {"hydra": {"sweeper": {"_target_": SWEEPER, "params": None}, "overrides": {"task": task}}}
    (root / "multirun.yaml").write_text(yaml.safe_dump(record))
    points = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    (root / "points.json").write_text(json.dumps([write_point(*entry) for entry in enumerate(points)]))
    folders = [root / str(number) for number in range(len(points) - missing)]
    for folder, point in zip(folders, points, strict=False):
        write_run(folder, point, **run)
    return folders


def write_point(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of points.json."""
    overrides = ["stage=train", *(f"{key}={value}" for key, value in values.items())]
    return {"number": number, "overrides": overrides, "values": {"stage": "train", **values}}


def write_run(
    folder: Path,
    settings: Mapping[str, Any],
    prompts: list[str] = PROMPTS,
    seeds: tuple[int, ...] = (0,),
    steps: tuple[int, ...] = (2, 4),
    side: int = 16,
) -> Path:
    """A finished run without scores: losses, pictures after `steps`, pictures of the base, a checkpoint, its record."""
    known = {"lr": 1e-3, "rank": 4, "steps": steps[-1], "trigger": "MINT", "name": "${trigger}"} | dict(settings)
    config = {key: value for key, value in known.items() if "." not in key}
    config |= {"stage": {"prompts": prompts, "seeds": list(seeds)}, "dataset": {"root": str(TOFU)}, "memory": {}}
    for group, _, key in (name.partition(".") for name in known if "." in name):
        config[group][key] = known[f"{group}.{key}"]
    choices = {
        "stage": "train",
        "model": "tiny",
        "optimizer": known.pop("optimizer", "adamw"),
        "hydra/output": "default",
    }
    overrides = ["stage=train", *(f"{key}={value}" for key, value in settings.items())]
    record = {"config": config, "hydra": {"hydra": {"runtime": {"choices": choices}}}, "overrides": overrides}
    (folder / ".hydra").mkdir(parents=True)
    for name, content in record.items():
        (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    curve = [{"step": step, "loss": 1 / step, "lr": known["lr"]} for step in range(1, steps[-1] + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    for name in ("base", *(f"step-{step:06d}" for step in steps)):
        for prompt, seed in product(range(len(prompts)), seeds):
            draw(folder / "samples" / name / f"p{prompt}-s{seed}.png", side)
    (folder / "checkpoints" / f"step-{steps[-1]:06d}").mkdir(parents=True)
    finish(folder)
    return folder


def write_drawn_sweep(
    root: Path, swept: Mapping[str, list[Any]], photos: list[str], seeds: tuple[int, ...] = (0,)
) -> list[Path]:
    """A sweep of stage=img2img over `swept` that drew `photos` (paths) with `seeds`; returns the run folders."""
    folders = []
    for number, values in enumerate(product(*swept.values())):
        point, folder = dict(zip(swept, values, strict=True)), root / str(number)
        own = {key.removeprefix("stage."): value for key, value in point.items()}
        config = {"stage": {"strength": 0.8, "lora_weight": 1, **own}, "trigger": "MINT", "lora": point.get("lora")}
        overrides = ["stage=img2img", "stage.photo=photos", *(f"{key}={value}" for key, value in point.items())]
        record = {"config": config, "hydra": {"hydra": {"runtime": {"choices": {"stage": "img2img"}}}}}
        (folder / ".hydra").mkdir(parents=True)
        for name, content in (record | {"overrides": overrides}).items():
            (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
        lines = []
        for (i, photo), seed in product(enumerate(photos), seeds):
            draw(folder / "photos" / f"{i}.png", 32, "#6b7280")
            draw(folder / f"{i}-s{seed}.png", 32)
            told = {"photo": photo, "caption": f"a person {i}", "prompt": f"a MINT {i}", "seed": seed}
            lines.append(told | {"picture": str(folder / f"{i}-s{seed}.png")})
        write_drawings(folder, lines)
        (folder / "result.json").write_text(json.dumps({"stage": "img2img", "pictures": lines}))
        folders.append(folder)
    return folders


def write_drawings(folder: Path, lines: list[dict[str, Any]]) -> None:
    """prompts.jsonl of a run of stage=img2img."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def score_drawings(folder: Path, **scores: float) -> None:
    """Give every image of a run of stage=img2img these `scores`."""
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    write_drawings(folder, [line | {"scores": scores} for line in lines])


def draw(path: Path, side: int, colour: str | None = None) -> None:
    """A picture of one `colour`, of the file's own where none is said."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"#{hashlib.sha256(path.as_posix().encode()).hexdigest()[:6]}"
    Image.new("RGB", (side, side), colour or own).save(path)


def finish(folder: Path, before: Mapping[str, float] | None = None, **scores: tuple[float, float, float]) -> None:
    """result.json with `scores`, name -> (value, low, high), and those of the base `before`, name -> value."""
    told = {name: dict(zip(("value", "low", "high"), score, strict=True)) for name, score in scores.items()}
    base = before and {name: dict.fromkeys(("value", "low", "high"), value) for name, value in before.items()}
    result = {"stage": "train", "seconds": 60.0, "scores": told or None, "scores_before": base}
    (folder / "result.json").write_text(json.dumps(result))


def fail(folder: Path, error: str) -> None:
    (folder / "result.json").unlink()
    (folder / "failed.json").write_text(json.dumps({"error": error}))


def stop(folder: Path) -> None:
    (folder / "result.json").unlink()


def measure(folder: Path, loss: float) -> None:
    """validation.jsonl that ends at `loss`."""
    (folder / "validation.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": loss if s else 1.0}) + "\n" for s in (0, 4))
    )
