"""What the user can mend."""


class InputError(Exception):
    """Wrong input: one sentence that names the file, the key or the number and says what to do.

    The entrypoint prints it without a traceback and exits with 2, so it is raised before anything is lost."""


class RunError(Exception):
    """A run that cannot go on though the input was right (a loss that is not a number): one sentence, exit code 1."""


class DiskFullError(RunError):
    """A file could not be written for want of space: one sentence that names it."""
