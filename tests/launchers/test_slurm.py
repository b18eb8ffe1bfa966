"""A sweep on a real Slurm of one node, started and stopped here. Needs root, and Debian's slurm-wlm and munge."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from sweep_runs import NO_JUDGE, SHORT, ended, free_ports, interrupt, pictures, start

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (slurm-wlm, munge)"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={home}/slurmctld
SlurmdSpoolDir={home}/slurmd
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a running Slurm, all of which lies in one temporary folder."""
    home = tmp_path_factory.mktemp("slurm")
    for folder in ("slurmctld", "slurmd"):
        (home / folder).mkdir()
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "munge.key").chmod(0o400)
    conf = home / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(home=home, host=host, ports=free_ports(2), cpus=min(2, os.cpu_count())))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = [f"--{kind}={home}/munge.{kind.partition('-')[0]}" for kind in ("key-file", "log-file", "pid-file")]
    munge += [f"--seed-file={home}/munge.seed", f"--socket={home}/munge.socket"]
    commands = (
        ["munged", "--force", "--foreground", *munge],
        ["slurmctld", "-D", "-f", conf],
        ["slurmd", "-D", "-f", conf],
    )
    running = []
    try:
        for command in commands:
            with (home / f"{command[0]}.out").open("w") as out:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        until = time.monotonic() + 60
        while "idle" not in (state := node_state(environment)):
            logs = "".join((home / f"{command[0]}.out").read_text()[-2000:] for command in commands)
            assert time.monotonic() < until, f"the node did not come up ({state}): {logs}"
            time.sleep(0.5)
        yield str(conf)
        while subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < until + 600, "a job does not end"
            time.sleep(0.2)
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def node_state(environment: dict[str, str]) -> str:
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
    return asked.stdout + asked.stderr


SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.partition=debug")


def test_the_jobs_of_a_sweep_are_slurms_jobs(slurm, tmp_path):
    pictures(tmp_path)
    code, _, err = ended(start(tmp_path, *SHORT, NO_JUDGE, "lr=1e-3,1e30", *SLURM, SLURM_CONF=slurm))
    assert code == 1 and "lora_lab: sweep/1: the loss of step 2 is nan" in err
    assert json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["steps"] == 30
    assert "step 2 is nan" in json.loads((tmp_path / "sweep" / "1" / "failed.json").read_text())["error"]
    assert list(tmp_path.glob("sweep/.submitit/*/*_log.out")), "Slurm has run them, not this machine's Python"


def test_ctrl_c_reaches_jobs_that_no_signal_reaches(slurm, tmp_path):
    pictures(tmp_path)
    run = tmp_path / "sweep" / "0"
    started = start(tmp_path, *SHORT, NO_JUDGE, "lr=1e-3,1e-2", "steps=3000", *SLURM, SLURM_CONF=slurm)
    code, _, err = interrupt(started, signal.SIGINT, run / "checkpoints" / "step-000003")
    assert code == 1 and "go on with: python -m lora_lab resume=sweep" in err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last < 3000 and (run / "checkpoints" / f"step-{last:06d}" / "training.json").is_file()


def test_a_preempted_job_is_queued_again_and_goes_on_from_its_checkpoint(slurm, tmp_path):
    pictures(tmp_path)
    run = tmp_path / "sweep" / "0"
    long = ("lr=1e-3,1e-2", "steps=60", "hydra.launcher.array_parallelism=1")
    started = start(tmp_path, *SHORT, NO_JUDGE, *long, *SLURM, SLURM_CONF=slurm)
    until = time.monotonic() + 120
    while not (run / "checkpoints" / "step-000005").exists() and time.monotonic() < until:
        time.sleep(0.05)
    number = (tmp_path / "sweep" / ".submitit").glob("*_0")
    job = next(number).name
    subprocess.run(["scancel", "--signal=USR2", job], env=os.environ | {"SLURM_CONF": slurm}, check=True)
    code, out, err = ended(started)
    logs = "".join(log.read_text() for log in tmp_path.glob("sweep/.submitit/*/*_log.*"))
    assert code == 0, out + err + logs
    assert "resumes" in logs
    steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(1, 61))
