"""The training loop, and only the loop: loading, pictures and files are calls."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lora_lab.console import bar
from lora_lab.errors import InputError, RunError
from lora_lab.launch.stopping import stop_on_signal
from lora_lab.training.loss import Batch
from lora_lab.training.memory import gc_paused
from lora_lab.training.pack import Pack
from lora_lab.training.randomness import seed_of
from lora_lab.training.run import Base, Run
from lora_lab.training.step import Job


def train_steps(runs: Sequence[Run], base: Base, packed: Callable[[Sequence[Job]], Pack] | None = None) -> None:
    """Do the steps that `runs` have left, or fewer where Ctrl-C asks for the end; those that end before others finish.

    With `packed` the jobs of several runs share every step. Then a run that fails leaves the others to go on."""
    together: list[Job] = []
    first, last = min(run.reached for run in runs), max(run.steps for run in runs)
    with stop_on_signal(runs[0].folder) as stopped, bar(total=last, initial=first, desc="train", unit="step") as shown:
        for step in range(first, last):
            now = [run for run in runs if run.left and run.reached == step]
            jobs = list({id(run.job): run.job for run in now}.values())
            if packed and list(map(id, jobs)) != list(map(id, together)):
                pack = None
                gc.collect()  # its memory goes before that of the next comes
                with gc_paused():
                    together, pack = jobs, packed(jobs)
            for run in now:
                run.step_begins()
            if packed:
                losses, others = _packed_step(pack, jobs, base, step), {}
            else:
                losses, others = _step(*jobs, base, step)
            for run in now:
                run.updating = True
            done = {id(job): (loss, job.rate(), job.update()) for job, loss in zip(jobs, losses, strict=True)}
            if packed:
                pack.publish()
            for run in now:
                run.step_ends()
            for run in now:  # of all, before one of them may end the memory with its pictures
                loss, rate, norm = done[id(run.job)]
                with apart(run, packed):
                    run.put(loss, norm, rate, **others)
            for run in now:
                with apart(run, packed):
                    if run.error is None:
                        run.after_step()
                    if run.error is None and run.reached == run.steps < last:
                        run.finish()
            numbers = [run.latest for run in now if run.latest]
            if numbers:
                loss = sum(each["loss"] for each in numbers) / len(numbers)
                shown.set_postfix(loss=f"{loss:.4f}", lr=f"{numbers[0]['lr']:.1e}", refresh=False)
            shown.update()
            if stopped() or not any(run.left for run in runs):
                break
        for run in runs:
            if run.error is None and run.result is None:
                with apart(run, packed):
                    run.settle()


@contextmanager
def apart(run: Run, packed: object) -> Iterator[None]:
    """Within the context what goes wrong is this run's own, if others train beside it."""
    try:
        yield
    except (RunError, InputError, OSError) as error:
        if not packed:
            raise
        run.fail(error)


def _step(job: Job, base: Base, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The backward passes of one job's step: its loss (1,), and other losses by name."""
    if not job.unet.training:  # a measurement left it in evaluation mode; to ask all modules takes 10 ms
        job.mode(training=True)
    torch.manual_seed(seed_of(job.seed, "dropout", step))  # only an adapter's dropout draws from it
    loss = _backward(job, partial(base.data.batch, caption_dropout=job.settings.caption_dropout), step)
    # The prior comes after all of the character's batches, whose dropout is then what it is without.
    others = {"prior_loss": _backward(job, base.prior.batch, step)} if base.prior else {}
    return loss.unsqueeze(0), others


def _backward(job: Job, batch: Callable[..., Batch], step: int) -> Tensor:
    """Add to the gradient what the batches of step `step` give; returns their loss."""
    loss, parts = torch.zeros((), device=job.learnt.master.device), job.settings.gradient_accumulation
    for part in range(parts):
        loss += job.backward(
            batch(seed=job.seed, step=step, part=part, parts=parts, batch_size=job.batch_size, asked=job.asked)
        )
    return loss


def _packed_step(pack: Pack, jobs: Sequence[Job], base: Base, step: int) -> Tensor:
    """The backward passes of a step of all jobs at once: their losses (J,)."""
    losses, parts = torch.zeros(len(jobs), device=jobs[0].learnt.master.device), jobs[0].settings.gradient_accumulation
    for part in range(parts):
        losses += pack.backward(
            [
                base.data.batch(
                    seed=job.seed,
                    step=step,
                    part=part,
                    parts=parts,
                    batch_size=job.batch_size,
                    asked=job.asked,
                    caption_dropout=job.settings.caption_dropout,
                )
                for job in jobs
            ]
        )
    return losses
