"""docs/train.sbatch, with stand-ins for SLURM's programs and torchrun: what it starts, passes on and queues again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "docs/train.sbatch"
STANDINS = {
    "srun": 'shift\nexec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$RECORD"; fi',
    "torchrun": """echo "torchrun $*" >> "$RECORD"
trap "sleep 0.3; exit 1" USR1
for i in $(seq $TENTHS); do sleep 0.1; done""",
}


@pytest.mark.parametrize(("warn", "status"), [(True, 1), (False, 0)])
def test_it_queues_the_job_again_after_a_warning_only(tmp_path: Path, warn: bool, status: int) -> None:
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    slurm = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8"}
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "TENTHS": "600" if warn else "2"}
    job = subprocess.Popen(["bash", str(SCRIPT), "x.yaml", "optim.lr=1"], env={**os.environ, **slurm, **more})
    while not record.exists():
        time.sleep(0.02)
    time.sleep(0.2)  # until its trap is set
    if warn:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == status
    first, *rest = record.read_text().splitlines()
    assert first.startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 41")
    assert "--rdzv-endpoint node7:29500" in first and first.endswith("tools/train.py x.yaml optim.lr=1 --resume auto")
    assert rest == (["requeue 41"] if warn else [])
