"""tools/normlab.py as a user starts it: real trainings of two norms."""

from pathlib import Path

from tests import programs

FAILS = "deconv:norm.overrides={nothing.*: {block: 8}}"
CONFIG = """
task: seg
length: 1 step
batch_size: 2
data: {crop: [64, 64]}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
runtime: {workers: 0, device: cpu, threads: 1}
report: {log_every: 1 step, tensorboard: false, images: 0}
"""


def test_two_norms_one_of_which_cannot_be(tmp_path: Path, sample_root: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [
        "normlab",
        "tiny.yaml",
        "--norms",
        "bn",
        FAILS,
        f"data.root={sample_root}",
        "--batch",
        "1",
        "--out",
        "lab",
    ]
    done = programs.run(*command, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"[2/2] {FAILS}, micro-batch 1, seed 0" in done.stdout
    assert "batch of 2 = 1 process x 2 accumulated x 1 images; 1 steps" in done.stdout
    assert "error: norm: " in done.stderr and "nothing" in done.stderr and "Traceback" not in done.stderr
    text = (tmp_path / "lab/lab.md").read_text()
    assert "| bn | bn_b1 | 1 | 0 | done |" in text and "failed: norm: " in text
    assert (tmp_path / "lab/bn_b1/last.pt").exists() and (tmp_path / "lab/lab.png").exists()
    listed = programs.run(*command, "--list", cwd=tmp_path)
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and len(lines) == 2
    assert lines[0].startswith("bn, micro-batch 1, seed 0: done, ") and ", seed 0: open  lab/deconv_" in lines[1]
