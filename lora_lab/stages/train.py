"""stage=train: train a LoRA."""

from pathlib import Path

from lora_lab.settings.schema import Config
from lora_lab.training import trainer
from lora_lab.training.resolve import resolve_run
from lora_lab.training.run import TrainResult


def train(config: Config, folder: Path) -> TrainResult:
    """Train as `config` describes into `folder`. Raises InputError before the base is loaded."""
    return trainer.train(resolve_run(config, folder))
