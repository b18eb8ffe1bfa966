"""A sweep on a real Ray cluster of two nodes on this machine, started and stopped here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sweep_runs import LIMIT, NO_JUDGE, SHORT, ended, free_ports, interrupt, pictures, start

pytest.importorskip("ray", reason='Ray is not installed: pip install "lora_lab[ray]"')
pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install --no-deps hydra-ray-launcher")
pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")
ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no network, no token in the home folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster whose first node gives no CPU, so that jobs must run on the second."""
    home = tmp_path_factory.mktemp("ray")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    environment = os.environ | ALONE
    port = address.partition(":")[2]
    temporary = Path(tempfile.mkdtemp(prefix="ray"))  # pytest's folders are too deep for a socket's name
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    head.append(f"--temp-dir={temporary}")  # what is left in the usual place would be found by the next ray.init()
    running = []
    try:
        for number, arguments in enumerate((head, [f"--address={address}", "--num-cpus=2"])):
            log = (home / f"{number}.out").open("w")
            command = [RAY, "start", "--block", "--object-store-memory=100000000", *arguments]
            running.append(subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log))
            until = time.monotonic() + LIMIT
            while "--block" not in (home / f"{number}.out").read_text():
                assert running[-1].poll() is None and time.monotonic() < until, (home / f"{number}.out").read_text()
                time.sleep(0.2)
        yield address
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def on(address: str) -> tuple[str, ...]:
    init = "hydra.launcher.ray.init"
    return "hydra/launcher=ray", f"{init}.address={address}", f"+{init}.object_store_memory=null"


def test_the_jobs_of_a_sweep_run_on_the_clusters_other_node(cluster, tmp_path):
    pictures(tmp_path)
    code, out, err = ended(start(tmp_path, *SHORT, NO_JUDGE, "lr=1e-3,1e30", *on(cluster), **ALONE))
    assert code == 1 and "lora_lab: sweep/1: the loss of step 2 is nan" in err, out + err
    assert json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["steps"] == 30
    assert "step 2 is nan" in json.loads((tmp_path / "sweep" / "1" / "failed.json").read_text())["error"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cache", "sweep", "tofu"], "relative paths are the user's"


def test_ctrl_c_stops_the_clusters_jobs_after_their_step(cluster, tmp_path):
    pictures(tmp_path)
    run = tmp_path / "sweep" / "0"
    started = start(tmp_path, *SHORT, NO_JUDGE, "lr=1e-3,1e-2", "steps=3000", *on(cluster), **ALONE)
    code, _, err = interrupt(started, signal.SIGINT, run / "checkpoints" / "step-000003")
    assert code == 1 and "go on with: python -m lora_lab resume=sweep" in err, err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last < 3000 and (run / "checkpoints" / f"step-{last:06d}" / "training.json").is_file()
