"""The run folder's module: signals that wait for a library to end."""

import signal

import pytest

from lora_lab.runs import signals_deferred


@pytest.mark.parametrize("fault", [None, TypeError("what compiled code made of it")])
def test_a_deferred_signal_arrives_at_the_end_whatever_the_library_made_of_it(fault):
    def stop(number, frame):
        raise KeyboardInterrupt(f"signal {number}")

    before, done = signal.signal(signal.SIGTERM, stop), []
    try:
        with pytest.raises(KeyboardInterrupt, match=f"signal {int(signal.SIGTERM)}"), signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("went on")
            if fault:
                raise fault
        assert done and signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
