"""Lines of jobs that share a screen."""

import io
import sys
from contextlib import redirect_stdout

from lora_lab.console import bar, labelled_output, say


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
