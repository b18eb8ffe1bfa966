"""What the four trainings share: a step as one CUDA graph, averaged weights, a budget in seconds.

A training may be cut into pieces. What a piece leaves behind is one small file of averaged fp16 weights; the next
goes on from them with a fresh optimizer. That costs a few hundred steps, and keeps a piece's state at 15 MB, not 120.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.tiny_base.recipe import Training

WARM_UP = 200  # steps over which the learning rate rises, at the start of every piece
FLOOR = 0.02  # of the highest learning rate: where the cosine ends
WATCH = 25  # steps between two looks at the clock: each of them waits for the device


def autocast(device: str) -> torch.autocast:
    """bf16. Casts are not cached: a cache that outlives a step can't be captured."""
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


def save(file: Path, modules: dict[str, nn.Module], seconds: float = 0.0, steps: int = 0, **notes: float) -> None:
    """Weights as fp16, keys "module:parameter"; what was spent on them is in the file's metadata."""
    weights = {
        f"{name}:{key}": value.detach().cpu().half().clone(memory_format=torch.contiguous_format)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(
        weights, partial, {"seconds": json.dumps(seconds), "steps": json.dumps(steps), "notes": json.dumps(notes)}
    )
    partial.replace(file)


def load(file: Path, modules: dict[str, nn.Module]) -> dict:
    """Put saved weights into the modules; returns {"seconds", "steps", "notes"}."""
    with safe_open(file, "pt") as stored:
        weights = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118, not a dict
        spent = {key: json.loads(value) for key, value in stored.metadata().items()}
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}:"): value for key, value in weights.items() if key.startswith(f"{name}:")}
        module.load_state_dict(own)
    return spent


def fit(
    file: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[], Tensor],
    plan: Training,
    until: float,
    log: Callable[[str], None],
) -> bool:
    """Train on until the plan's seconds are spent, or until the clock (time.time()) says `until`; True if all are.

    `loss` draws its own batch and must not wait for the device. `file` is where the training goes on from, and where
    it leaves the averaged weights, which are in the modules afterwards. The learning rate follows a cosine in time."""
    begun = time.time()
    spent = load(file, modules) if file.is_file() else {"seconds": 0.0, "steps": 0}
    if spent["seconds"] >= plan.seconds:
        return True
    parameters = [p for module in modules.values() for p in module.parameters()]
    device = parameters[0].device
    rate = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=on_gpu, capturable=on_gpu
    )
    average = Average(parameters, plan.decay)
    recent = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        recent.lerp_(value.detach().float(), 0.02)

    run = captured(step, log) if on_gpu else step
    size = sum(p.numel() for p in parameters) / 1e6
    log(f"{file.stem}: {size:.2f} M parameters, ready after {time.time() - begun:.0f} s")
    steps, reported = 0, time.time()
    while True:
        seconds = spent["seconds"] + time.time() - begun
        if seconds >= plan.seconds or time.time() >= until:
            break
        progress = seconds / plan.seconds
        warm = min(1.0, (steps + WATCH) / WARM_UP)
        rate.fill_(plan.rate * warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))))
        for _ in range(WATCH if on_gpu else 1):
            run()
            steps += 1
        if on_gpu:
            torch.cuda.synchronize()
        if time.time() - reported > 20:
            reported = time.time()
            log(f"{file.stem}: {steps} steps, {seconds:.0f} of {plan.seconds:.0f} s, loss {recent.item():.4f}")
    average.store()
    seconds = spent["seconds"] + time.time() - begun
    save(file, modules, seconds=seconds, steps=spent["steps"] + steps)
    log(f"{file.stem}: {spent['steps'] + steps} steps in {seconds:.0f} s, loss {recent.item():.4f}")
    return seconds >= plan.seconds


def captured(step: Callable[[], None], log: Callable[[str], None]) -> Callable[[], None]:
    """The step as one CUDA graph: these models are so small that launching their kernels one by one takes longer than
    running them. The learning rate must be 0 here, for warming up runs the step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        log(f"the step can't be captured and runs eagerly, several times slower: {str(error).splitlines()[0]}")
        return step
    return graph.replay


class Average:
    """Exponential moving average of parameters; short at first, so that it forgets the beginning."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self._parameters = parameters
        self._mean = [p.detach().clone() for p in parameters]
        self._decay = decay
        self._count = torch.zeros((), device=parameters[0].device)

    @torch.no_grad()
    def update(self) -> None:
        self._count += 1
        weight = 1 - ((1 + self._count) / (10 + self._count)).clamp(max=self._decay)
        change = torch._foreach_sub(self._parameters, self._mean)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self._mean, change)

    @torch.no_grad()
    def store(self) -> None:
        """Put the averages into the parameters."""
        torch._foreach_copy_(self._parameters, self._mean)
