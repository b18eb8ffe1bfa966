"""stage=compare: write the page that compares the runs of a sweep, or of any folders."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.locate import locate_folder
from lora_lab.board.page import frontier, resemblances, verdict, write_page
from lora_lab.board.read import read_sweep
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.launch.command_line import write_missing_points
from lora_lab.runs import display_path, refuse_unwritable
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class CompareResult:
    stage: str
    page: str  # path
    picture: str | None  # path of the matrix as one labelled image; None for captions
    runs: dict[str, int]  # done, failed, unfinished, missing -> number of runs
    measure: str | None  # the ranking's criterion: a score's name, validation_loss, or None
    winner: str | None  # folder of the best run
    reason: str
    ranking: list[str]  # folders, the best first
    ties: list[str]  # folders of the runs that are as good as the winner
    frontier: list[str]  # folders of the runs that no other run beats in both `kept` and `character`
    damaged: dict[str, list[str]]  # folders of runs with files that could not be read, and why


def compare(config: Config, folder: Path) -> CompareResult:
    """Compare the runs in `stage.folder`. The page of one sweep is written into it, of several folders into `folder`.

    Raises InputError for a folder that does not exist or cannot be written to, and if no run has trained."""
    sources = [locate_folder("stage.folder", name) for name in config.stage.folders]
    is_sweep = len(sources) == 1 and (sources[0] / "multirun.yaml").is_file()
    target = sources[0] if is_sweep else folder
    for source in sources:
        write_missing_points(source)
    sweep = read_sweep(sources, datasets=_typed_datasets(config))
    if not sweep.runs:
        raise InputError(f"no training runs in {', '.join(map(str, sources))}: name a sweep's folder, or run folders")
    ranked = verdict(sweep)
    refuse_unwritable(target, "copy it to where you may write")
    page = write_page(sweep, ranked, target)
    run_folders = [str(run.folder) for run in sweep.runs]
    ranking = [run_folders[i] for i in ranked.ranking]
    for sentence in [*(line for run in sweep.runs for line in run.damage), ranked.sentence["en"]]:
        say(sentence)
    say(f"compare the runs: {display_path(page)}")
    states = ("done", "failed", "unfinished", "missing")
    return CompareResult(
        stage="compare",
        page=str(page),
        picture=None if sweep.captioned else str(target / "comparison.png"),
        runs={state: sum(run.status == state for run in sweep.runs) for state in states},
        measure=ranked.measure,
        winner=ranking[0] if ranking else None,
        reason=ranked.sentence["en"],
        ranking=ranking,
        ties=[run_folders[i] for i in ranked.ties],
        frontier=[run_folders[i] for i in frontier(resemblances(sweep))],
        damaged={str(run.folder): list(run.damage) for run in sweep.runs if run.damage},
    )


def _typed_datasets(config: Config) -> list[Path]:
    """The dataset folders of this command line, whose images may be shown."""
    found = []
    for folder in config.dataset.folders:
        with suppress(InputError):
            found.append(locate_folder("dataset.root", folder.root))
    return found
