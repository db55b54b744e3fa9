"""The programs in tools/ as a user starts them: exit status, what they print, what they write."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from engine.plan import Curve, Plan
from engine.video import writing
from seg.labels import to_label_ids
from tests import programs
from tools import train

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
task: seg
length: 2 steps
batch_size: 2
data: {crop: [64, 64]}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
norm: {name: deconv, block: 16}
runtime: {workers: 0, device: cpu, threads: 1}
report: {log_every: 1 step, eval_every: 2 steps, tensorboard: false}
"""
IMAGES = """
task: classify
length: 2 steps
batch_size: 6
data: {name: folder, val_split: val, size: 32}
model: {name: vgg11, options: {width: 0.125}}
norm: {name: deconv, block: 16, fc_block: 16}
runtime: {workers: 0, device: cpu, threads: 1}
report: {log_every: 1 step, eval_every: 2 steps, tensorboard: false}
"""


def tool(name: str, *arguments: object, cwd: Path = ROOT, status: int = 0) -> str:
    done = programs.run(name, *arguments, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory, sample_root: Path) -> Path:
    """A folder with a config and a trained run, made by the program."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tiny.yaml").write_text(CONFIG)
    out = tool("train", "tiny.yaml", f"data.root={sample_root}", "--work-dir", "runs/x", cwd=folder)
    assert "work directory: runs/x" in out.splitlines()
    return folder


@pytest.fixture(scope="module")
def classifier(project: Path, image_root: Path) -> str:
    """The work directory, below the project, of a trained classifier."""
    (project / "images.yaml").write_text(IMAGES)
    out = tool("train", "images.yaml", f"data.root={image_root}", "--work-dir", "runs/c", cwd=project)
    assert "work directory: runs/c" in out.splitlines()
    return "runs/c"


def test_every_tool_has_help():
    for path in sorted((ROOT / "tools").glob("*.py")):
        command = [sys.executable, str(path), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert f"tools/{path.name}" in done.stdout and not done.stderr


def test_the_demos_data_may_have_no_blank_in_its_path():
    command = ["make", "--dry-run", "demo", "DATA=/data/my scenes"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "DATA=/data/my scenes: a path without blanks is needed here" in done.stderr


def test_show_prints_the_resolved_config_with_origins(project: Path, sample_root: Path):
    text = tool("train", "tiny.yaml", "--show", "optim.lr=0.05", "norm.name=bn", cwd=project)
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["lr"].split() == ["lr:", "0.05", "#", "override"]
    assert "tiny.yaml:4" in lines["batch_size"] and "default" in lines["momentum"] and "block" not in lines


@pytest.mark.parametrize("config", ["seg/deeplabv3_resnet50_deconv.yaml", "classify/vgg11_cifar10.yaml"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--show", "norm.name=deconv_fast"], "rank: 64"),
        (["--explain", "norm", "norm.name=deconv"], "Newton-Schulz steps."),
        (["norm.name=deconv", "norm.rnk=3"], "has no option 'rnk' (did you mean 'rank'?)"),
    ],
)
def test_a_config_is_shown_and_refused_without_the_seconds_that_importing_torch_takes(config, arguments, told):
    code = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "tools/train.py", f"configs/{config}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert told in done.stdout + done.stderr and done.stdout.endswith("False\n")


def test_explain_tells_what_keys_mean(project: Path, sample_root: Path):
    text = tool("train", "tiny.yaml", "--explain", "norm.name=bn", cwd=project)
    assert "norm.name: bn" in text and "optim.lr: " in text and "Learning rate after warm-up" in text
    assert tool("train", "tiny.yaml", "norm.name=bn", "--explain", "optim.lr", cwd=project).count("\n") == 2


def test_evaluate_a_checkpoint(project: Path):
    out = tool("evaluate", "runs/x/best.pt", "--split", "val", "--json", "s.json", "--out", "pics", cwd=project)
    assert "road" in out and "mean" in out
    scores = json.loads((project / "s.json").read_text())
    assert 0 <= scores["averageScoreClasses"] <= 1 and "road" in scores["classScores"]
    assert {"confusion.png", "class_iou.png"} <= {path.name for path in (project / "pics").iterdir()}
    assert out.splitlines()[-1] == "scores: s.json, pictures: pics"
    out = tool("evaluate", "runs/x/best.pt", cwd=project)
    assert out.splitlines()[-1] == "scores: runs/x/scores_val/scores.json, pictures: runs/x/scores_val"
    stored = project / "runs/x/scores_val"
    assert json.loads((stored / "scores.json").read_text()) == scores and (stored / "confusion.png").exists()


def test_predictions_score_as_the_checkpoint_does(project: Path, sample_root: Path):
    """predict.py writes what evaluate.py scores: the numbers of both ways are equal."""
    images = sample_root / "leftImg8bit/val"
    kinds = ("labels", "color", "overlay")
    said = tool("predict", "runs/x/best.pt", images, "--out", "out", "--save", *kinds, cwd=project)
    assert said.splitlines()[-2:] == ["written to out/labels, out/color, out/overlay", "2 images labelled"]
    truth = sample_root / "gtFine/val"
    tool("evaluate", "--predictions", "out/labels", "--ground-truth", truth, "--json", "a.json", cwd=project)
    tool("evaluate", "runs/x/best.pt", "--json", "b.json", cwd=project)
    a, b = (json.loads((project / name).read_text()) for name in ("a.json", "b.json"))
    assert a["averageScoreClasses"] == b["averageScoreClasses"] and a["confMatrix"] == b["confMatrix"]
    for kind in kinds:
        files = sorted((project / "out" / kind).rglob("*.png"))
        assert len(files) == 2 and cv2.imread(str(files[0])) is not None


WITHOUT_US = """
import json, sys, torch
facts = {"network.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts).module()
with torch.no_grad():
    torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
print(len(json.loads(facts["network.json"])["classes"]))
assert not {"norm", "engine", "seg"} & set(sys.modules)
"""


def test_an_exported_program_labels_as_we_do_without_our_code(project: Path, sample_root: Path):
    done = tool("export", "runs/x/best.pt", "--out", "x.pt2", "--size", "64", "128", cwd=project)
    assert done.startswith("x.pt2 (") and "a program for N images of 64x128" in done
    image = next(sample_root.glob("leftImg8bit/val/*/*.png"))
    pixels = torch.from_numpy(cv2.imread(str(image))[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    torch.save(pixels, project / "in.pt")
    command = [sys.executable, "-c", WITHOUT_US, "x.pt2", "in.pt", "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0 and done.stdout == "19\n", done.stderr
    tool("predict", "runs/x/best.pt", image, "--out", "one", cwd=project)
    labels = cv2.imread(str(next((project / "one/labels").glob("*.png"))), cv2.IMREAD_UNCHANGED)
    ids = to_label_ids(torch.load(project / "out.pt")[0].argmax(0).numpy().astype("uint8"))
    assert (ids == labels).mean() > 0.999  # a tie may go either way


def test_an_exported_classifier(project: Path, classifier: str):
    assert "N images of 32x32" in tool("export", f"{classifier}/best.pt", "--out", "c.pt2", cwd=project)
    assert "weights" in tool("export", f"{classifier}/best.pt", "--out", "made/c.safetensors", cwd=project)


def test_one_unreadable_image_stops_nothing(project: Path, sample_root: Path):
    folder = project / "photos"
    folder.mkdir()
    good = sorted(sample_root.glob("leftImg8bit/val/*/*.png"))[0]
    (folder / "good.png").write_bytes(good.read_bytes())
    (folder / "broken.png").write_bytes(good.read_bytes()[:200])
    err = tool("predict", "runs/x/best.pt", "photos", "--out", "out2", cwd=project, status=1)
    assert len(list((project / "out2/labels").glob("*.png"))) == 1
    assert "Traceback" not in err


def test_a_video_that_a_signal_stops_leaves_nothing(project: Path):
    folder = project / "stopped"
    folder.mkdir()
    with writing(folder / "in.mp4", 25, (128, 64)) as append:
        for number in range(3000):
            append(np.full((64, 128, 3), number % 256, np.uint8))
    command = [
        sys.executable,
        ROOT / "tools/predict.py",
        "runs/x/best.pt",
        "stopped/in.mp4",
        "--out",
        "stopped/out.mp4",
    ]
    done = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob(".*.part*")):
        assert done.poll() is None, "ended before it could be stopped"
        time.sleep(0.05)
    done.terminate()
    assert done.communicate() == (None, "stopped by SIGTERM\n") and done.returncode == 143
    assert [path.name for path in folder.iterdir()] == ["in.mp4"]
    shutil.copy(folder / "in.mp4", folder / "other.mp4")
    told = tool("predict", "runs/x/best.pt", "stopped/*.mp4", "--out", "stopped/out.mp4", cwd=project, status=2)
    assert told == "error: stopped/in.mp4: a video goes alone; found 2 inputs, start the program for each\n"


def test_weights_for_predict_that_are_a_program(project: Path):
    shutil.copy(project / "runs/x/best.pt", project / "like.pt2")
    told = tool("predict", "like.pt2", "photos", "--out", "o", cwd=project, status=2)
    assert (
        told
        == "error: like.pt2: an exported program (torch.export), expected a checkpoint such as the best.pt it is of\n"
    )


def test_compare_draws_one_picture_of_two_runs(project: Path):
    tool("compare", "runs/x", "runs/x", "--names", "one", "two", "--out", "both.png", cwd=project)
    assert cv2.imread(str(project / "both.png")) is not None


def test_compare_tells_of_other_data(project: Path):
    other = project / "runs/elsewhere"
    shutil.copytree(project / "runs/x", other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("val_split: val", "val_split: train"))
    command = ["compare", "runs/x", "runs/elsewhere", "--out", "other.png"]
    for more in (["--examples", "0"], ["--names", "a", "a"]):
        out = tool(*command, *more, cwd=project)
        assert "note: runs/x and runs/elsewhere name different data to score (data.val_split: val and train)" in out


def test_a_classifier_is_scored_and_compared(project: Path, classifier: str):
    out = tool("evaluate", f"{classifier}/best.pt", cwd=project)
    assert "tram" in out and "top-1" in out
    assert out.splitlines()[-1] == f"scores: {classifier}/scores_val/scores.json, pictures: {classifier}/scores_val"
    scores = json.loads((project / classifier / "scores_val/scores.json").read_text())
    rows = [json.loads(line) for line in (project / classifier / "metrics.jsonl").read_text().splitlines()]
    assert scores["images"] == 9 and scores["top1"] == rows[-1]["score"]
    pictures = {path.name for path in (project / classifier / "scores_val").glob("*.png")}
    assert {"confusion.png", "class_accuracy.png", "mistakes.png"} >= pictures >= {"confusion.png"}
    tool("compare", classifier, classifier, "--names", "one", "two", "--out", "c.png", cwd=project)
    assert cv2.imread(str(project / "c.png")) is not None


def test_a_classifier_tells_the_likeliest_classes(project: Path, classifier: str, image_root: Path):
    command = ["predict", f"{classifier}/best.pt", image_root / "val/car", "--topk", "2"]
    out = tool(*command, "--out", "named", cwd=project)
    assert "3 images classified" in out and out.count(" %, ") == 3
    assert len((project / "named/predictions.csv").read_text().splitlines()) == 1 + 3 * 2
    assert tool(*command, cwd=project) == out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["predict", "runs/c/best.pt", "x.png", "--save", "labels"], "a classifier; --save is for segmentation"),
        (["predict", "runs/c/best.pt", "x.png", "--flip"], "a classifier; --flip is for segmentation"),
        (["predict", "runs/c/best.pt", "x.png"], "x.png: no such file"),
        (["predict", "runs/c/best.pt", "x.png", "--topk", "0"], "--topk: 0; expected 1 to 3"),
        (["predict", "runs/x/best.pt", "x.png"], "a segmentation network; give --out DIR"),
        (["evaluate", "runs/c/best.pt", "--split", "test"], "test"),
        (["compare", "runs/c", "runs/x", "--out", "o.png"], "runs/x"),
        (["train", "images.yaml", "data.root=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_with_a_classifier(project: Path, classifier: str, arguments: list[str], text: str):
    err = tool(arguments[0], *arguments[1:], cwd=project, status=2)
    assert text in err and "error:" in err


@pytest.mark.slow
def test_two_processes_train_one_classifier(project: Path, classifier: str, image_root: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools/train.py"), "images.yaml", f"data.root={image_root}", "--work-dir", "runs/c2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=project, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch of 6 = 2 processes x 1 accumulated x 3 images; 2 steps" in done.stdout
    assert done.stdout.count("(9 images)") == 1


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such config file"),
        (["train", "tiny.yaml", "optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["train", "tiny.yaml", "norm.blocks=3"], "no option 'blocks' (did you mean 'block'?)"),
        (["train", "tiny.yaml", "data.root=/nowhere"], "make_sample.py"),
        (["train", "tiny.yaml", "task=paint"], "task: found 'paint', expected 'seg' or 'classify'"),
        (["evaluate", "nowhere.pt"], "nowhere.pt: cannot read the checkpoint"),
        (["evaluate", "tiny.yaml"], "tiny.yaml: not a checkpoint"),
        (["evaluate", "--predictions", "none", "--ground-truth", "."], "none (--predictions): no such folder"),
        (["evaluate", "runs/x/best.pt", "--predictions", "x"], "without the checkpoint runs/x/best.pt; leave one"),
        (["predict", "runs/x/best.pt", "nothing*.png", "--out", "o"], "nothing*.png"),
        (["predict", "runs/x/best.pt", "a.mp4", "--out", "o.mp4", "--smooth", "1.5"], "--smooth: found 1.5, expected"),
        (["make_sample", "x", "--size", "big"], "error:"),
        (["compare", "runs/none", "--out", "o.png"], "runs/none"),
        (["export", "runs/x/best.pt", "--out", "x.onnx"], "x.onnx: expected a name that ends in .pt2"),
        (
            ["export", "runs/x/best.pt", "--out", "x.pt2", "--size", "0", "4"],
            "--size 0 4: expected a height and a width",
        ),
        (
            ["export", "runs/x/best.pt", "--out", "x.safetensors", "--size", "8", "8"],
            "--size: is for a program (.pt2); the weights in x.safetensors fit images of any size",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(project: Path, arguments: list[str], text: str):
    err = tool(arguments[0], *arguments[1:], cwd=project, status=2)
    assert text in err and "error:" in err


def test_two_processes_train_one_network(project: Path, sample_root: Path):
    """As torchrun starts it, on CPUs: one global batch, one log, one set of checkpoints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools/train.py"), "tiny.yaml", f"data.root={sample_root}", "--work-dir", "runs/two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch of 2 = 2 processes x 1 accumulated x 1 images; 2 steps" in done.stdout
    assert done.stdout.count("step 2/2") == 1 and done.stdout.count("evaluated after step 2") == 1
    tool("evaluate", "runs/two/best.pt", cwd=project)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("evaluate", ["x.pt", "--card"]),
        ("evaluate", ["--predictions", "x", "data.root=y"]),
        ("errors", ["x.pt", "--out", "x.html"]),
        ("submit", ["x.pt", "--out", "x.zip"]),
        ("predict", ["x.pt", "x.png", "--out", "x"]),
        ("inspect", ["data.root=x"]),
    ],
)
def test_what_one_process_does_stops_under_torchrun_at_once(project: Path, name: str, arguments: list[str]):
    """Before anything is read: there is no x."""
    done = programs.run(name, *arguments, cwd=project, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"error (process 0): tools/{name}.py" in done.stderr and "start it without torchrun" in done.stderr


def test_of_several_processes_the_first_one_tells_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = Plan("a plan", 2**30, 2, 2, 0, {False: Curve({1: {"forward": 1, "again: forward": 1}})})
    monkeypatch.setattr("seg.plan.plan", lambda loaded, budget: found)
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train._plan(SimpleNamespace(config=SimpleNamespace(task="seg")), "1GiB") == 0
        assert capsys.readouterr().out.count("a plan") == count
