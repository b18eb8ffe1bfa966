import os

import pytest

# Before anything imports torch: the models of the tests are so small that threads only wait for each other, and on a
# busy machine they do so for minutes. No test may depend on the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def composed():
    """`composed("stage=train", "lr=1e-3")`: the configuration that the command line would give."""
    from lora_lab.config import compose

    return compose
