"""What watches a run: the hooks between the steps."""


class Observer:
    """Hooks of a run; each does nothing unless an observer defines it. `step` is the number of steps done.

    All numbers of a step have arrived and are finite before `on_step` and `on_end` are called for work that is due."""

    def on_start(self, step: int) -> None:
        """The run starts, or resumes after `step` steps."""

    def on_step(self, step: int) -> None:
        """A step is done, and it is not the last one."""

    def on_end(self, step: int) -> None:
        """The last step is done."""
