"""The scores of the finished LoRA, and the base's beside them."""

from dataclasses import dataclass

from lora_lab.console import say
from lora_lab.evaluation.scores import ScoredImages, numbers, rows, table, write_lines
from lora_lab.track.base import Track
from lora_lab.training.artifacts import RunArtifacts
from lora_lab.training.base_context import BaseContext
from lora_lab.training.observer import Observer
from lora_lab.training.resolve import ResolvedTraining


@dataclass
class FinalScores(Observer):
    """Scores the finished LoRA by what it renders."""

    resolved: ResolvedTraining
    artifacts: RunArtifacts
    context: BaseContext
    tracker: Track
    scored: ScoredImages | None = None

    def on_end(self, step: int) -> None:
        """Render and score; write scores.jsonl and the tracker's table."""
        resolved, context = self.resolved, self.context
        if context.base_scores is None:
            return
        folder = resolved.folder / "samples" / "score"
        self.scored = context.scorer.score(self.artifacts.lora, resolved.render, folder, context.encoder)
        write_lines(resolved.folder, [context.base_scores, self.scored])
        say(table([context.base_scores, self.scored]))
        self.tracker.numbers(step, numbers(self.scored.scores))
        self.tracker.table(step, rows(self.scored, resolved.rank, resolved.lr, step))
