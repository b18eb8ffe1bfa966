"""Write the page that compares the runs of a sweep, or of any folders."""

from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.locate import locate_folder
from lora_lab.board.page import write_page
from lora_lab.board.read import read_sweep
from lora_lab.board.verdict import verdict
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.launch.grid import write_missing_points
from lora_lab.runs import refuse_unwritable
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class CompareResult:
    stage: str
    page: str
    picture: str  # the matrix as one labelled picture
    runs: dict[str, int]  # done, failed, unfinished, missing -> how many
    measure: str | None  # by what they were ranked: a score's name, validation_loss, or nothing
    winner: str | None  # its folder
    reason: str
    ranking: list[str]  # folders, the best first
    ties: list[str]  # those that are as good as the winner


def compare(config: Config, folder: Path) -> CompareResult:
    """Compare what lies in `stage.folder`. One sweep gets the page itself, several folders are compared in `folder`.

    Raises InputError where nothing was trained."""
    folders = [locate_folder("stage.folder", name) for name in config.stage.folders]
    sweep = len(folders) == 1 and (folders[0] / "multirun.yaml").is_file()
    to = folders[0] if sweep else folder
    for recorded in folders:
        write_missing_points(recorded)
    found = read_sweep(folders)
    if not found.runs:
        raise InputError(f"no training runs in {', '.join(map(str, folders))}: name a sweep's folder, or run folders")
    judged = verdict(found)
    refuse_unwritable(to, "copy it to where you may write")
    page = write_page(found, judged, to)
    places = [str(run.folder) for run in found.runs]
    ranking = [places[i] for i in judged.ranking]
    say(judged.sentence["en"])
    say(f"compare the runs: {page}")
    return CompareResult(
        stage="compare",
        page=str(page),
        picture=str(to / "comparison.png"),
        runs={s: sum(run.status == s for run in found.runs) for s in ("done", "failed", "unfinished", "missing")},
        measure=judged.measure,
        winner=ranking[0] if ranking else None,
        reason=judged.sentence["en"],
        ranking=ranking,
        ties=[places[i] for i in judged.ties],
    )
