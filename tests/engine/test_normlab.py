"""The norm lab: its cells, its files, failures, and going on after a stop; cells are trained in this process."""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest

from engine import normlab
from engine.config import load
from engine.errors import UserError
from engine.normlab import Request, cells, make, request, run_program
from engine.resume import find_resume
from engine.signals import StopRequest
from tests.engine import toy
from tests.engine.toy import ToyConfig

CONFIG = """
task: toy
length: 4 steps
batch_size: 8
optim: {lr: 0.1}
runtime: {device: cpu, workers: 0}
report: {tensorboard: false, log_every: 1 step}
"""


class Trainer:
    """Stands in for the program: trains the toy network, unless told to fail or stop."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fail: dict[str, tuple[int, list[str]]] = {}
        self.stop_at = ""

    def __call__(self, words: Sequence[str], stop: StopRequest) -> tuple[int, list[str]]:
        assert words[0] == "train"
        config, *keys = words[1 : words.index("--work-dir")]
        run = Path(words[words.index("--work-dir") + 1])
        self.started.append(run.name)
        if run.name in self.fail:
            return self.fail[run.name]
        loaded = load(config, keys, ToyConfig)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(loaded.text)
        cfg = loaded.config
        if run.name == self.stop_at:
            cfg = cfg.model_copy(update={"length": type(cfg.length)(2, "steps")})
            stop.signal = signal.SIGTERM
        toy.train(cfg, run, resume=find_resume(run, "auto", cfg), hook=_with_norm)
        return 143 if stop.requested else 0, []


def _with_norm(net: Any) -> None:
    from torch import nn

    net.backbone.append(nn.BatchNorm2d(6))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    found = Trainer()
    monkeypatch.setattr(normlab, "run_program", found)
    return found


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    (tmp_path / "toy.yaml").write_text(CONFIG)

    def made(
        norms: Sequence[str] = ("bn", "gn:norm.groups=3"), batches: Sequence[int] = (4, 8), **more: Any
    ) -> Request:
        return request(tmp_path / "toy.yaml", tmp_path / "lab", norms=norms, batches=batches, **more)

    return made


@pytest.mark.parametrize("whole", [False, True])
def test_precise_statistics_are_of_as_many_images_in_all_cells(ask: Any, whole: bool):
    wanted = ask(
        norms=["bn:norm.precise_batches=3", "gn"],
        batches=[2, 8, 16],
        whole=whole,
        overrides=["batch_size=16", "length=1 epoch"],
    )
    found = [one.loaded.config for one in cells(wanted, ToyConfig)]
    assert [one.norm.precise_batches * one.split(1).micro_batch for one in found] == [48, 48, 48, 0, 0, 0]
    wanted = ask(
        norms=["bn:norm.precise_batches=3"], batches=[2, 8], overrides=["batch_size=16", "norm.calibrate_batches=1"]
    )
    assert [one.loaded.config.norm.calibrate_batches for one in cells(wanted, ToyConfig)] == [8, 2]


def test_a_cell_is_a_micro_batch_of_the_same_batch(ask: Any):
    found = cells(ask(batches=[8, 2]), ToyConfig)
    assert [one.run.name for one in found] == ["bn_b2", "bn_b8", "gn_norm.groups_3_b2", "gn_norm.groups_3_b8"]
    for one, micro in zip(found, [2, 8, 2, 8], strict=True):
        cfg = one.loaded.config
        assert (cfg.micro_batch, cfg.batch_size, cfg.optim.lr) == (micro, 8, 0.1)
    assert found[2].loaded.config.norm.options == {"groups": 3}


def test_whole_batches_scale_the_rate(ask: Any):
    norms = ["bn", "gn:norm.groups=3,optim.lr=0.4"]
    wanted = ask(norms=norms, batches=[2, 16], whole=True, overrides=["length=1 epoch"])
    found = [one.loaded.config for one in cells(wanted, ToyConfig)]
    assert [(cfg.batch_size, cfg.micro_batch, cfg.optim.lr) for cfg in found] == [
        (2, None, 0.025),
        (16, None, 0.2),
        (2, None, 0.1),
        (16, None, 0.8),
    ]


def test_the_arguments_of_a_cell_give_its_config(ask: Any):
    for one in cells(ask(overrides=["optim.momentum=0.5"], seeds=[0, 3]), ToyConfig):
        config, *keys = one.arguments[: one.arguments.index("--work-dir")]
        assert load(config, keys, ToyConfig).text == one.loaded.text
        assert one.arguments[-4:] == ("--work-dir", str(one.run), "--resume", "auto")


def test_a_grid_is_trained_drawn_and_not_trained_twice(ask: Any, trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    wanted = ask(command="python tools/normlab.py ...")
    assert make(wanted, ToyConfig, ["train"])
    assert trainer.started == ["bn_b4", "bn_b8", "gn_norm.groups_3_b4", "gn_norm.groups_3_b8"]
    text = (wanted.folder / "lab.md").read_text()
    content = json.loads((wanted.folder / "lab.json").read_text())
    assert text.startswith("# Norm lab: toy.yaml, global batch 8\n") and wanted.command in text
    assert [run["micro_batch"] for run in content["runs"]] == [4, 8, 4, 8]
    one = content["runs"][2]
    assert (one["norm"], one["state"], one["steps"], one["lr"]) == ("gn:norm.groups=3", "done", 4, 0.1)
    assert one["step_seconds"] == pytest.approx(one["training_seconds"] / 4) and one["peak_memory_bytes"] > 1e7
    scores = {(run["norm"], run["micro_batch"]): f"{100 * run['last']:.2f}" for run in content["runs"]}
    assert f"| 4 | {scores['bn', 4]} | {scores['gn:norm.groups=3', 4]} |" in text
    picture = cv2.imread(str(wanted.folder / "lab.png"))
    assert picture is not None and picture.shape[1] > 1000
    capsys.readouterr()
    assert make(wanted, ToyConfig, ["train"]) and len(trainer.started) == 4
    assert (wanted.folder / "lab.md").read_text() == text
    assert capsys.readouterr().out == f"\n4 of 4 cells are trained: {wanted.folder / 'lab.md'}\n"


def test_curves_of_nearly_equal_values_lie_below_the_upper_frame(ask: Any, monkeypatch: pytest.MonkeyPatch):
    """Limits taken from values of a narrow range leave almost no room above them, once they begin at 0."""
    wanted, real, drawn = ask(), normlab.plots.figure, []

    @contextmanager
    def kept(*arguments: Any) -> Iterator[Any]:
        with real(*arguments) as figure:
            yield figure
            drawn.append(figure)

    def outcome(cell: Any, state: str) -> Any:
        memory, seconds = (3 << 30) + (cell.batch << 20), 4 + cell.batch / 1000
        return SimpleNamespace(cell=cell, state=state, last=0.5, step=4, seconds=seconds, memory=memory)

    monkeypatch.setattr(normlab.plots, "figure", kept)
    for state in ("done", "failed"):
        found = cells(wanted, ToyConfig)
        normlab.draw(wanted, {(one.norm.slug, one.batch, one.seed): outcome(one, state) for one in found})
    for axes in drawn[0].axes[1:]:
        highest = max(max(line.get_ydata()) for line in axes.lines)
        assert axes.get_ylim() == pytest.approx((0, 1.08 * highest))
    assert all(axes.get_ylim()[0] == 0 for axes in drawn[1].axes[1:])  # without a point


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture takes longer than these trainings."""
    monkeypatch.setattr(normlab, "draw", lambda *_: None)


@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_fails_is_named_and_the_others_go_on(ask: Any, trainer: Trainer):
    wanted = ask()
    trainer.fail = {
        "bn_b4": (2, ["warning: x", "error: the loss is not finite; try a lower optim.lr", "bye"]),
        "bn_b8": (-9, []),
        "gn_norm.groups_3_b4": (1, ["Traceback (most recent call last):", "RuntimeError: odd"]),
    }
    assert not make(wanted, ToyConfig, ["train"])
    text = (wanted.folder / "lab.md").read_text()
    assert "| 4 | failed: the loss is not finite | failed: RuntimeError: odd |" in text
    assert "| 8 | failed: ended by signal 9 (out of memory?) |" in text
    reasons = [run["reason"] for run in json.loads((wanted.folder / "lab.json").read_text())["runs"]]
    assert reasons[0] == "the loss is not finite; try a lower optim.lr" and reasons[3] is None
    trainer.fail = {}
    trainer.started.clear()
    assert make(wanted, ToyConfig, ["train"])
    assert trainer.started == ["bn_b4", "bn_b8", "gn_norm.groups_3_b4"]


def test_the_reason_of_a_score_that_is_not_finite_stays(ask: Any, monkeypatch: pytest.MonkeyPatch):
    (cell,) = cells(ask(norms=["bn"], batches=[8]), ToyConfig)
    failed = normlab.Outcome(cell, "failed", reason="the outputs of its last evaluation are not finite")
    monkeypatch.setattr(normlab, "run_program", lambda *_: (0, ["a library's warning"]))
    monkeypatch.setattr(normlab.grid, "look", lambda _: failed)
    with normlab.StopRequest() as stop:
        assert normlab._train(["train"], stop, cell) == (failed, False)


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_grid_goes_on_where_it_was(ask: Any, trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    wanted = ask()
    trainer.stop_at = "bn_b8"
    assert not make(wanted, ToyConfig, ["train"])
    assert trainer.started == ["bn_b4", "bn_b8"]
    assert "stopped by a signal; the same command goes on" in capsys.readouterr().out
    states = [run["state"] for run in json.loads((wanted.folder / "lab.json").read_text())["runs"]]
    assert states == ["done", "partly", "open", "open"]
    trainer.stop_at = ""
    assert make(wanted, ToyConfig, ["train"])
    assert trainer.started[2:] == ["bn_b8", "gn_norm.groups_3_b4", "gn_norm.groups_3_b8"]
    assert "resumed after step 2 of 4" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_several_seeds_have_a_mean_and_a_deviation(ask: Any, trainer: Trainer):
    wanted = ask(norms=["bn"], batches=[8], seeds=[0, 1])
    assert make(wanted, ToyConfig, ["train"]) and trainer.started == ["bn_b8", "bn_b8_seed1"]
    text = (wanted.folder / "lab.md").read_text()
    assert "mean ± standard deviation of the seeds 0, 1" in text and text.count(" ± ") == 2


@pytest.mark.parametrize(
    "options, text",
    [
        ({"norms": ["bn", "bn"]}, "--norms: bn is there twice"),
        ({"batches": [2, 2]}, "--batch: 2 is there twice"),
        ({"batches": [0]}, "--batch: found 0, expected at least 1"),
        ({"norms": ["bn:lr"]}, "--norms: found 'bn:lr', expected NAME or NAME:key=value"),
        ({"norms": ["bn:micro_batch=3"]}, "--norms: bn:micro_batch=3: micro_batch differs from cell to cell"),
        ({"overrides": ["norm.name=gn"]}, "key=value: norm.name differs from cell to cell; set it with --norms"),
        ({"norms": ["bn:norm={name: gn}"]}, "norm.name differs from cell to cell; set it with --norms"),
        ({"norms": ["gn:norm={}"]}, "--norms: gn:norm={}: norm.name differs from cell to cell"),
        ({"overrides": ["runtime={seed: 5}"]}, "key=value: runtime.seed differs from cell to cell"),
        ({"whole": True}, "4 steps, in which larger batches see more images; give it in epochs"),
        ({"batches": [3]}, "batch_size: 8 images cannot be divided evenly"),
        ({"norms": ["nn"]}, "nn"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(ask: Any, trainer: Trainer, options: dict[str, Any], text: str):
    with pytest.raises(UserError) as error:
        make(ask(**options), ToyConfig, ["train"])
    assert text in str(error.value) and not trainer.started


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_programs_status_and_last_words(capsys: pytest.CaptureFixture[str]):
    code = "import sys; [print(f'line {i}', file=sys.stderr) for i in range(30)]; sys.exit(3)"
    status, said = run_program(program(code), StopRequest())
    assert status == 3 and said == [f"line {i}" for i in range(10, 30)]
    assert "line 0\n" in capsys.readouterr().err
    assert run_program(program("import os; os.kill(os.getpid(), 9)"), StopRequest())[0] == -9


def test_a_stop_is_passed_on_once():
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('stopping', file=sys.stderr, flush=True), sys.exit(1)))\n"
        "print('ready', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )
    stop = StopRequest()
    started = time.monotonic()
    threading.Timer(1.0, lambda: setattr(stop, "signal", signal.SIGTERM)).start()
    assert run_program(program(code), stop) == (1, ["ready", "stopping"])
    assert time.monotonic() - started < 30
