"""stage=check: what stage=train would refuse, and what would make a worse LoRA, before any GPU time is spent."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from lora_lab.base.load import token_counter
from lora_lab.base.locate import locate_folder
from lora_lab.captions.phrases import CommonWords, is_background
from lora_lab.captions.syntax import length_warnings
from lora_lab.console import printable, say
from lora_lab.errors import InputError
from lora_lab.images.dataset import (
    apply_caption_affixes,
    find_masks,
    list_names,
    missing_captions,
    read_folders,
    require_distinct_names,
    require_trigger,
    same_name_twice,
    unmatched_captions,
)
from lora_lab.images.inspection import Findings, inspect_dataset
from lora_lab.images.pixels import aspect_buckets
from lora_lab.runs import write_json
from lora_lab.settings.schema import Config, Triggers


@dataclass(frozen=True)
class CheckResult:
    stage: str
    errors: list[str]  # stage=train refuses the folder for each of these, and no other stage corrects them
    warnings: list[str]
    ready: bool  # whether stage=train accepts the folder as it is
    findings: Findings


def check(config: Config, folder: Path) -> CheckResult:
    """Check the folders of dataset.root, print the report and write it to `folder`/check.json.

    Raises InputError after that if stage=train would refuse the folder; missing captions and a missing trigger, which
    stage=caption and stage=refine add, are warnings."""
    folders = [(locate_folder("dataset.root", f.root), f.repeats) for f in config.dataset.folders]
    roots = [root for root, _ in folders]
    require_distinct_names(roots)
    dataset, model, triggers = config.dataset, config.model, config.triggers

    def training_text(name: str, caption: str) -> str:
        return apply_caption_affixes(caption, dataset.caption_prefix, dataset.caption_suffix, triggers.of(name))

    count_tokens = token_counter(model.base)
    if count_tokens is None:
        say(f"captions are not measured in tokens: the tokenizer of {model.base} cannot be reached")
    findings = inspect_dataset(
        roots,
        triggers,
        aspect_buckets(model.resolution, model.bucket_step),
        find_masks(config.loss.mask),
        training_text,
        count_tokens,
        config.text.window,
        dataset.follow_links,
        config.class_noun,
    )
    where = ", ".join(map(str, roots))
    errors, refusals = _errors(findings, where), missing_captions(findings.uncaptioned, findings.pictures, where)
    if not errors and not refusals:
        errors, refusals = _try_to_read(folders, config, training_text)
    warnings = [
        *(f"stage=train refuses this folder as it is: {refusal}" for refusal in refusals),
        *_warnings_of_files(findings, dataset.kohya_folders),
        *_warnings_of_images(findings, dataset.random_crop),
        *_warnings_of_captions(findings, triggers, config.text.window),
    ]
    result = CheckResult("check", errors, warnings, not (errors or refusals), findings)
    write_json(folder / "check.json", asdict(result))
    say(report(result, where))
    if errors:
        raise InputError(errors[0] + (f" (and {len(errors) - 1} more)" if errors[1:] else ""))
    return result


def _errors(findings: Findings, where: str) -> list[str]:
    errors = [*findings.unreadable.values(), *findings.unmasked.values()]
    if findings.caption_files:
        errors.append(findings.caption_files)
    errors += unmatched_captions(findings.pictureless, findings.uncaptioned, where, findings.unused)
    if findings.same_name:
        errors.append(same_name_twice(findings.same_name, where))
    return errors


def _try_to_read(
    folders: Sequence[tuple[Path, int]], config: Config, training_text: Callable[[str, str], str]
) -> tuple[list[str], list[str]]:
    """Read (folder, repeats) as stage=train does: (its error, its refusal of captions without the trigger)."""
    try:
        samples = read_folders(folders, config.dataset.follow_links, config.dataset.kohya_folders)
    except InputError as error:
        return [str(error)], []
    try:
        texts = {s.name: [training_text(s.name, caption) for caption in s.captions] for s in samples}
        require_trigger(texts, config.triggers)
    except InputError as error:
        return [], [str(error)]
    return [], []


def _warnings_of_files(findings: Findings, kohya_folders: bool) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in findings.unused.items():
        by_reason.setdefault(reason, []).append(name)
    warnings = [f"not used: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    if findings.folder_repeats and not kohya_folders:
        folders = {str(PurePosixPath(name).parent): times for name, times in findings.folder_repeats.items()}
        names = list_names([f"{folder} ({times} times)" for folder, times in folders.items()])
        warnings.append(
            f"folders are named with repeats as kohya's scripts read them, {names}, but each image counts once: set "
            "dataset.kohya_folders=true, or dataset.repeats"
        )
    for names in findings.same_but_case:
        warnings.append(f"{' and '.join(names)} are one file on Windows and macOS: rename one")
    return warnings


def _warnings_of_images(findings: Findings, random_crop: bool) -> list[str]:
    warnings = []
    if findings.enlarged:
        worst = max(findings.enlarged, key=findings.enlarged.__getitem__)
        warnings.append(
            f"{len(findings.enlarged)} pictures would be enlarged, {worst} {findings.enlarged[worst]:.1f} times: "
            "the LoRA learns the blur too; find larger ones or lower the resolution"
        )
    for name, share in findings.cut_away.items():
        seen = "is seen in crops (dataset.random_crop)" if random_crop else "is cut away, perhaps with the character"
        warnings.append(f"{name} is far longer than its bucket: {share:.0%} of it {seen}; crop it yourself")
    for name, frames in findings.frames.items():
        warnings.append(f"{name} has {frames} frames or pages, of which the first is used: save the best as a PNG")
    for name in findings.blank:
        warnings.append(f"{name} is black or transparent all over: remove it or take another frame")
    for copy, original in findings.duplicates:
        warnings.append(f"{copy} is the same picture as {original}: it counts twice; keep the larger file")
    return warnings


def _warnings_of_captions(findings: Findings, triggers: Triggers, window: int) -> list[str]:
    warnings = []
    if findings.without_trigger:
        count, names = len(findings.without_trigger), list_names(findings.without_trigger)
        their = "the trigger of their folder" if triggers.all[1:] else triggers.phrase
        warnings.append(f"{count} captions do not have {their} ({names}): run stage=refine")
    warnings += [*length_warnings(findings.too_long, window, "the caption of "), *findings.syntax]
    by_language: dict[str, list[str]] = {}
    for name, language in findings.foreign.items():
        by_language.setdefault(language, []).append(name)
    for language, named in by_language.items():
        warnings.append(f"{list_names(named)}: the caption is {language}: CLIP reads English, so translate it")
    for names in findings.repeated:
        warnings.append(f"{list_names(names)} have the same caption: say what differs, or remove copies")
    for trigger, words in findings.common_words.items():
        warnings += _warnings_of_words(words, trigger, f" of {trigger}" if triggers.all[1:] else "")
    return warnings


def _warnings_of_words(words: CommonWords, trigger: str, of: str) -> list[str]:
    warnings = []
    for phrase, count in words.shared.items():
        where = f'"{phrase}" is in {count} of {words.captions} captions{of}'
        if is_background(phrase):
            warnings.append(f"{where}: it will be learnt as part of {trigger}; add pictures with other backgrounds")
        else:
            warnings.append(
                f"{where}: {trigger} should stand for what most pictures show; stage=refine refiner.strip=auto takes "
                "it out"
            )
    for phrase, count in words.constant.items():
        noun = phrase.rpartition(" ")[2]
        warnings.append(
            f'"{phrase}" is in all {count} captions{of} that mention the {noun}: if it is in the other pictures too, '
            f"{trigger} should stand for it; stage=refine 'refiner.strip=[{phrase}]' takes it out"
        )
    return warnings


def report(result: CheckResult, where: str) -> str:
    """The result as lines to read: counts, errors, warnings, and whether the folder is ready for training."""
    findings = result.findings
    buckets = ", ".join(f"{shape} ({count})" for shape, count in findings.buckets.items())
    lines = [f"{where}: {findings.pictures} pictures, {findings.captions} captions", f"buckets: {buckets or 'none'}"]
    lines += [f"error:   {printable(line)}" for line in result.errors]  # one line each, whatever a name has in it
    lines += [f"warning: {printable(line)}" for line in result.warnings]
    if result.errors:
        return "\n".join([*lines, f"stage=train would refuse this folder: {len(result.errors)} to correct"])
    return "\n".join([*lines, "ready for stage=train" if result.ready else "not ready for stage=train yet"])
