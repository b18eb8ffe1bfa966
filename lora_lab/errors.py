"""What the user can mend."""


class InputError(Exception):
    """Wrong input: one sentence that names the file, the key or the number and says what to do.

    The entrypoint prints it without a traceback and exits with 2, so it is raised before anything is lost."""


class RunError(Exception):
    """A run that cannot go on though the input was right (a loss that is not a number): one sentence, exit code 1."""


class DiskFullError(RunError):
    """A file could not be written for want of space: one sentence that names it."""


def excerpt(text: object, longest: int = 80) -> str:
    """What a message shows of a text from a file, or of a path: at most `longest` characters and a mark where a longer
    one is cut in the middle, none of which a terminal obeys. The name at the end of a path stays."""
    whole = str(text)
    ends = whole if len(whole) <= longest else whole[:longest] + whole[-longest:]
    visible = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in ends)
    if len(visible) <= longest:
        return visible
    return f"{visible[: longest - longest // 2]}…{visible[-(longest // 2) :]}"
