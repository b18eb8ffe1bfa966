"""Which jobs of a sweep can share every step, and why the others cannot."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from lora_lab.adapters.fresh import DROPOUTS
from lora_lab.base.load import pick_device, pick_dtype
from lora_lab.schema import Config, Train
from lora_lab.training.memory import CONTEXT, expected_mib

# What is a job's own. Everything else is the base's and the data's, which jobs of a group have in common.
OWN = {"lr", "rank", "steps", "seed", "name", "publish", "resume", "lora", "optimizer", "schedule", "tracker"}
OWN_OF_ADAPTER = {"r", "lora_alpha", "use_rslora", "init_lora_weights"}
OWN_OF_STAGE = {
    "max_grad_norm", "lora_plus_ratio", "caption_dropout", "ema_decay", "checkpoint_every", "keep_checkpoints",
    "validate_every", "prompts", "seeds", "save_dtype",
}  # fmt: skip
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
ON_A_CPU = 16  # jobs that share a step where no GPU's memory sets the bound


def alone(config: Config) -> str | None:
    """Why a job cannot share its steps; None if it can."""
    adapter, stage = config.adapter, config.stage
    if not isinstance(stage, Train):
        return "only stage=train is packed"
    if adapter["_target_"] != "peft.LoraConfig" or adapter["use_dora"]:
        return "its adapter is no LoRA"
    if str(adapter["init_lora_weights"]).startswith("pissa"):
        return "PiSSA begins with the base's weights"
    if any(adapter.get(key) for key in DROPOUTS):
        return "its adapter has dropout"
    targets = adapter["target_modules"]
    if isinstance(targets, str) or any(name in CONVOLUTIONS for name in targets):
        return "its adapter is not of linear layers alone"
    if config.text.learns:
        return "something of the text learns"
    if config.prior.kind != "none":
        return "it has a prior"
    if stage.start_from:
        return "it begins with a file"
    if pick_dtype(config.model.precision, pick_device(config.device)) == torch.float16:
        return "in float16 every job scales its loss by itself"
    return None


def groups(configs: Sequence[Config], most: int | None) -> list[list[int]]:
    """The numbers of the jobs that share their steps, in their order; of those that cannot, each by itself.

    `most` jobs at once, or as many as a GPU's memory should take."""
    found: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(f"alone {i}" if alone(config) else _common(config), []).append(i)
    parts = []
    for numbers in found.values():
        size = most or fitting([configs[i] for i in numbers])
        count = -(-len(numbers) // size)
        size = -(-len(numbers) // count)  # of about equal size
        parts += [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return parts


def _common(config: Config) -> str:
    settings = {key: value for key, value in asdict(config).items() if key not in OWN}
    settings["adapter"] = {key: value for key, value in config.adapter.items() if key not in OWN_OF_ADAPTER}
    settings["stage"] = {key: value for key, value in vars(config.stage).items() if key not in OWN_OF_STAGE}
    return repr(settings)


def fitting(configs: Sequence[Config]) -> int:
    """How many of these jobs a GPU's free memory should take at once, at least 1."""
    if pick_device(configs[0].device).type != "cuda":
        return ON_A_CPU
    free = torch.cuda.mem_get_info()[0] / 2**20
    largest = max(configs, key=lambda config: config.rank)
    count = 1
    while count < len(configs) and _expected(largest, count + 1) - CONTEXT < free:
        count += 1
    return count


def _expected(config: Config, count: int) -> float:
    return expected_mib(replace(config, batch_size=config.batch_size * count, rank=config.rank * count))


def followed(configs: Sequence[Config]) -> list[int]:
    """Of every job that of which it is the beginning: the same but for more steps, under a schedule that does not
    depend on their number. Its own number where there is none."""
    longest: dict[str, int] = {}
    for i, config in enumerate(configs):
        kind = _beginning(config, i)
        if kind not in longest or config.steps > configs[longest[kind]].steps:
            longest[kind] = i
    return [longest[_beginning(config, i)] for i, config in enumerate(configs)]


def _beginning(config: Config, number: int) -> str:
    schedule = config.schedule
    if schedule.name not in ("constant", "constant_with_warmup") or 0 < schedule.warmup < 1:
        return f"{number}"
    own = asdict(config) | {"steps": 0, "name": "", "publish": None, "tracker": None, "resume": None}
    own["stage"] = {key: value for key, value in vars(config.stage).items() if key in OWN_OF_STAGE}
    return repr(own)
