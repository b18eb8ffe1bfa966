"""bitsandbytes' 8-bit optimizers without synchronization: theirs wait for the GPU at every tensor, and the GPU is then
idle while Python prepares the next step."""

from collections.abc import Callable

import torch
from bitsandbytes import optim
from bitsandbytes.optim.optimizer import Optimizer8bit


class _Asynchronous(Optimizer8bit):
    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:
        """One update; bitsandbytes' own, which synchronizes, for a closure and for the first step."""
        if closure is not None or not self.initialized:
            return super().step(closure)
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, i, j)
                self.update_step(group, parameter, i, j)
        return None


class AdamW8bit(_Asynchronous, optim.AdamW8bit):
    """torch.optim.AdamW with its state in 8 bits; the keys are those of bitsandbytes'."""


class Lion8bit(_Asynchronous, optim.Lion8bit):
    """Lion with its state in 8 bits; the keys are those of bitsandbytes'."""
