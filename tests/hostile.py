"""Dataset folders that nobody should have, made by rule, and what must hold for each.

    python -m tests.hostile --count 300 --seed 0

Every folder has two ordinary images and a few odd ones: a suffix in some letter case, a place, a name, a content and a
form of captions in some encoding, drawn by seed and number. stage=check, stage=convert and, for a part, stage=train
with models that cannot be loaded must exit with 0 or 2, with 2 in one sentence, without a traceback or control
characters; leave every file as it was; open no file outside of the folder; and open or name every file in it."""

import argparse
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from pillow_heif import register_heif_opener

from lora_lab.__main__ import main as run_command
from lora_lab.console import UNPRINTABLE, printable
from lora_lab.images.scan import FORMATS, SYSTEM_FILES
from tests.unloadable import unloadable_models

CASES = (str.lower, str.upper, str.title)
SUFFIXES = (*FORMATS, ".svg", ".psd", ".cr2", ".jxl", ".tga", ".mp4", ".npz", ".png~", ".png.part", "", ".txt", ".json")
PLACES = ("", "", "", "in/", "10_tofu/", "a/b/c/", "@eaDir/", "#recycle/", "lost+found/", ".thumbnails/", "__MACOSX/")
NAMES = (
    b"a", b"IMG_0001", "두부 1".encode(), "두부 1".encode("utf-16-le")[:1] + b"x", "é".encode(), b"e\xcc\x81",
    "🙂".encode(), b"caf\xe9", b"a\nb", b"a\tb", b"\x1b[2J", "a\u202egnp".encode(), b"-dash", b".hidden", b"._a",
    b"a=b,c [d] {e}", b"it's \"quoted\"", b"${oc.env:HOME}", b"%s %d", b"x" * 240, "두".encode() * 80, b"9" * 200,
    b"con", b" lead and trail ", b"CON.aux", b"constructor", b"<script>alert(1)<",
)  # fmt: skip
CONTENTS = (
    "image", "image", "image", "other format", "animation", "grey16", "transparent", "black", "pixel", "panorama",
    "line", "empty", "cut", "text", "bomb", "eps", "fifo", "link in", "link out", "link to nothing", "link to itself",
    "folder",
)  # fmt: skip
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json", "meta_cap.json", "in/metadata.jsonl", "METADATA.JSONL")
FORMS = ("none", "txt", "TXT", "caption", *TABLES, *TABLES[:3])
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp949", "cp932", "latin-1")
TEXTS = (
    "A HANA_TOFU, smiling", "A HANA_TOFU, smiling", "두부, 웃음", "笑う豆腐", "a\x1b[31m tofu", "", "x " * 20_000,
    "[" * 5000, '"', "a, b; c\td", "\ud83d", "null", "(tofu:1.3) <lora:x:1> {trigger}",
)  # fmt: skip
FORMS_WRITTEN = ("jsonl", "csv", "json", "txt")
RUNS = {"check": (), "convert": (), "train": ("model.judge=null",)}  # stage -> its overrides


class Opened:
    """An audit hook that collects the files that are opened, and programs that are started, while it is active."""

    def __init__(self) -> None:
        self.paths: set[str] | None = None

    def __call__(self, event: str, args: tuple) -> None:
        if self.paths is not None and event in ("open", "subprocess.Popen", "os.system") and args[0]:
            path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            self.paths.add(path if event == "open" else event)

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        self.paths = paths = set()
        yield paths
        self.paths = None


def make_folder(root: Path, rule: random.Random) -> list[str]:
    """Fill `root`, and the folder `outside` beside it, by the choices of `rule`; returns them in words."""
    (root.parent / "outside").mkdir(parents=True)
    for path in (root / "00.png", root / "01.png", root.parent / "outside" / "secret.png"):
        path.parent.mkdir(exist_ok=True)
        _picture(rule).save(path)
    (root / rule.choice(sorted(SYSTEM_FILES - {"icon\r"}))).write_bytes(b"x")
    words = []
    for _ in range(rule.randint(1, 3)):
        suffix, case, place = rule.choice(SUFFIXES), rule.choice(CASES), rule.choice(PLACES)
        name, content = rule.choice(NAMES), rule.choice(CONTENTS)
        path = root / place / os.fsdecode(name + case(suffix).encode())
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fill(path, content, FORMATS.get(suffix, "PNG"), rule)
            words.append(f"{printable(os.fsdecode(path.relative_to(root)))} ({content})")
    form, encoding, text = rule.choice(FORMS), rule.choice(ENCODINGS), rule.choice(TEXTS)
    _write_captions(root, form, encoding, text)
    return [*words, f"captions: {form} in {encoding}, {printable(text[:20])!r}"]


def _picture(rule: random.Random, size: tuple[int, int] = (64, 48)) -> Image.Image:
    blocks = np.random.default_rng(rule.randrange(2**32)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size)


def _fill(path: Path, content: str, form: str, rule: random.Random) -> None:
    """Make the file, link or folder at `path`."""
    targets = {"link in": "00.png", "link to nothing": "nothing", "link to itself": path.name}
    if content == "fifo":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "link out":
        outside = next(parent for parent in path.parents if (parent / "outside").is_dir()) / "outside"
        path.symlink_to(rule.choice((outside, outside / "secret.png", Path("/etc/passwd"), Path("/dev/zero"))))
    elif content in targets:
        path.symlink_to(targets[content])
    else:
        path.write_bytes(_bytes(content, form, rule))


def _bytes(content: str, form: str, rule: random.Random) -> bytes:
    picture, file = _picture(rule), io.BytesIO()
    if content in ("empty", "text"):
        return b"" if content == "empty" else b"no picture at all"
    if content == "bomb":  # a PNG of 20000 x 20000 pixels by its header
        Image.new("1", (8, 8)).save(file, "PNG")
        return file.getvalue().replace(b"\0\0\0\x08\0\0\0\x08", b"\0\0\x4e\x20\0\0\x4e\x20")
    sizes = {"pixel": (1, 1), "panorama": (640, 64), "line": (2000, 2)}
    if content in sizes:
        picture = _picture(rule, sizes[content])
    if content in ("black", "transparent"):
        picture = Image.new("RGBA", (64, 48), (0, 0, 0, 255 if content == "black" else 0))
        form = "PNG"
    if content == "grey16":
        picture, form = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"
    form = {"other format": rule.choice(("PNG", "JPEG", "WEBP", "GIF")), "eps": "EPS"}.get(content, form)
    if content == "animation":
        picture.save(file, rule.choice(("GIF", "WEBP", "PNG")), save_all=True, append_images=[_picture(rule)] * 2)
    else:
        picture.save(file, form)
    return file.getvalue()[: len(file.getvalue()) // 2] if content == "cut" else file.getvalue()


def _write_captions(root: Path, form: str, encoding: str, text: str) -> None:
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in FORMATS]
    rows = {os.fsencode(name).decode(errors="replace"): text for name in sorted(names)}
    if form in ("txt", "TXT", "caption"):
        for name in names:
            beside = (root / name).with_suffix(f".{form}")
            if not os.path.lexists(beside) and not beside.parent.is_symlink():
                beside.write_bytes(text.encode(encoding, errors="replace"))
    elif form != "none":
        file = root / form
        file.parent.mkdir(exist_ok=True)
        if form.lower().endswith(".jsonl"):
            content = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name in rows)
        elif form.endswith(".csv"):
            content = "file_name,text\n" + "".join(f'"{name}","{text}"\n' for name in rows)
        else:
            content = json.dumps(rows, ensure_ascii=False)
        file.write_bytes(content.encode(encoding, errors="replace"))


def state(root: Path) -> list[tuple]:
    """What a user has in a folder: every entry with its type, target or content."""
    entries = []
    for folder, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = Path(folder, name)
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            entries.append((str(path), path.lstat().st_mode, str(content)))
    return sorted(entries)


def _end(number: int, frame: object) -> None:
    raise TimeoutError("it waits for ever")


def run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line, which may take a minute."""
    handlers, out, err = logging.root.handlers[:], io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(60)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = run_command([*arguments])
    except BaseException:
        code = 1
        traceback.print_exc(file=err)
    finally:
        signal.alarm(0)
        logging.root.handlers[:] = handlers
        GlobalHydra.instance().clear()
    return code, out.getvalue(), err.getvalue()


def faults(root: Path, stage: str, overrides: Sequence[str], opened: Opened) -> Iterator[str]:
    """What does not hold for `stage` with the folder `root`."""
    before, home = state(root), root.parent
    places = [f"dataset.root={root}", f"hydra.run.dir={home / stage}"]
    if stage == "convert":
        places += [f"stage.output={home / 'converted'}", f"stage.form={FORMS_WRITTEN[int(home.name) % 4]}"]
    with opened.watch() as paths:
        code, out, err = run([f"stage={stage}", *overrides, *RUNS[stage], *places])
    said = [line for line in err.splitlines() if line.startswith("lora_lab: ")]
    if code not in (0, 2) or "Traceback" in err:
        yield f"exit code {code}: {err[-1500:]}"
    if code == 2 and (len(said) != 1 or len(said[0]) > 2500):
        yield f"not one sentence: {said}"
    if UNPRINTABLE.search((out + "".join(said)).replace("\n", "")):
        yield f"control characters are printed: {(out + err)!r}"
    if state(root) != before:
        yield "the folder has changed"
    if outside := {path for path in paths if path.startswith((str(home / "outside"), "/etc/passwd", "/dev/zero"))}:
        yield f"opened outside of the folder: {outside}"
    if stage != "train" and (started := paths & {"subprocess.Popen", "os.system"}):  # which asks git for its revision
        yield f"a program is started: {started}"
    report = home / stage / "check.json"
    if stage == "check" and report.is_file():
        named = json.dumps(json.loads(report.read_text(encoding="utf-8")), ensure_ascii=False)
        yield from (f"{name} is neither opened nor named" for name in _overlooked(root, paths, named))


def _overlooked(root: Path, opened: set[str], named: str) -> Iterator[str]:
    """The files and links in `root` that were not opened, and of which the report names neither them nor a folder."""
    for path in (Path(entry) for entry, mode, _ in state(root) if not Path(entry).is_dir() or Path(entry).is_symlink()):
        name = path.relative_to(root)
        silent = path.name.lower() in SYSTEM_FILES or path.name.startswith("._")
        places = [printable(str(part)) for part in (name, *name.parents[:-1])]
        escaped = [json.dumps(place, ensure_ascii=False)[1:-1] for place in places]
        if not silent and str(path) not in opened and not any(place in named for place in escaped):
            yield printable(str(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folders and print what does not hold; returns the number of folders with a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="number of folders")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other folders")
    settings = parser.parse_args(argv)
    register_heif_opener()
    opened = Opened()
    sys.addaudithook(opened)
    faulty = 0
    with tempfile.TemporaryDirectory() as temporary:
        common = ("dataset=folder", "tracker=off", *unloadable_models(Path(temporary) / "models"))
        for number in range(settings.count):
            rule = random.Random(f"{settings.seed} {number}")
            root = Path(temporary) / str(number) / "data"
            words = make_folder(root, rule)
            stages = [stage for stage in RUNS if stage != "train" or number % 4 == 0]
            found = [f"{stage}: {fault}" for stage in stages for fault in faults(root, stage, common, opened)]
            if found:
                faulty += 1
                print(f"folder {number}: {'; '.join(words)}", *found, sep="\n  ", flush=True)
            shutil.rmtree(root.parent)
    print(f"{settings.count} folders, {faulty} with a fault (seed {settings.seed})")
    return faulty


if __name__ == "__main__":
    sys.exit(min(main(), 1))
