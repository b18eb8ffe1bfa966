"""Lines of jobs that share a screen."""

import io
import logging
import os
import sys
from contextlib import redirect_stdout

import pytest

from lora_lab.console import bar, labelled_output, printable, say
from lora_lab.errors import InputError
from lora_lab.launch.run_job import report


def test_each_line_of_a_job_begins_with_its_label_and_is_written_at_once():
    writes = []

    class Screen(io.StringIO):
        def write(self, text):
            writes.append(text)
            return len(text)

    with redirect_stdout(Screen()), labelled_output("#3 "):
        say("one\ntwo")
        print("three", "four", end="")
        print(" five")
    assert writes == ["#3 one\n#3 two\n", "#3 three four five\n"]


def test_an_inner_label_replaces_the_outer_one(capsys):
    with labelled_output("#0,1 "), labelled_output("#1 "):
        say("done")
    say("all done")
    assert capsys.readouterr().out == "#1 done\nall done\n"


def test_jobs_that_share_a_screen_show_no_bars():
    with labelled_output("#0 "):
        assert bar([1]).disable
    assert not bar([1], file=sys.stderr).disable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("두부 🙂 \t~", "두부 🙂 \t~"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nlora_lab: done\r", "a\\x0alora_lab: done\\x0d"),
        ("\x9b2J \u202egnp.exe\u2028", "\\x9b2J \\u202egnp.exe\\u2028"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("x" * 3000, "x" * 2000 + "... (1000 more)"),
    ],
)
def test_what_a_terminal_would_obey_is_printed_as_an_escape_and_a_long_line_is_cut(text, shown, capsys, caplog):
    assert printable(text) == shown
    with caplog.at_level(logging.INFO):
        say(f"first\n{text}")
    assert report(InputError(text)) == 2
    printed = capsys.readouterr()
    lines = ["first", *map(printable, text.split("\n"))]
    assert printed.out == "\n".join(lines) + "\n" and printed.err == f"lora_lab: {shown}\n"
    assert caplog.messages == ["\n".join(lines).strip()]
