"""The paper's tables: planned, trained cell by cell, stopped and gone on with, written down."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from classify import losses, paper, table, table_files, train
from classify.config import ClassifyConfig
from classify.table_cells import Cell, Outcome, Request, cells, request
from engine.config import load
from engine.errors import UserError
from engine.grid import look
from engine.processes import in_processes
from engine.report import read_metrics
from tools import table1

CONFIG = """
task: classify
length: 20 epochs
batch_size: 20
data: {name: cifar10, root: ROOT, check_files: false, download: false}
model: {name: NETWORK, options: {width: 0.125}}
optim: {lr: 0.05, schedule: cosine}
recipes: {deconv: {block: 16}}
runtime: {workers: 0, device: cpu, threads: 1}
report: {log_every: 1 step, tensorboard: false}
"""


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, cifar_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for network in ("vgg11", "vgg16"):
        text = CONFIG.replace("NETWORK", network).replace("ROOT", str(cifar_root))
        (folder / f"{network}_cifar10.yaml").write_text(text)
    return folder


@pytest.fixture
def ask(tmp_path: Path, configs: Path) -> Any:
    def make(*networks: str, **options: Any) -> Request:
        return request(tmp_path, networks=networks or ("vgg16",), configs=configs, **options)

    return make


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves take longer than these trainings."""
    monkeypatch.setattr(table_files, "draw", lambda *_: None)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work directories in which a training was started."""
    found: list[str] = []
    real = train.run

    def run(loaded: Any, work_dir: Path, resume: str | None) -> Any:
        found.append(work_dir.name)
        return real(loaded, work_dir, resume)

    monkeypatch.setattr(train, "run", run)
    return found


def row(text: str, network: str) -> list[str]:
    """The cells of the table's line of a network."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {network} |"))
    return [word.strip() for word in re.split(r"(?<!\\)\|", line.strip("|"))][1:]


def last_score(run: Path) -> float:
    return float([one for one in read_metrics(run / "metrics.jsonl") if one["kind"] == "eval"][-1]["score"])


def test_a_table_is_made_and_not_made_twice(ask: Any, trained: list[str], capsys: pytest.CaptureFixture[str]):
    wanted = ask(command="python tools/table1.py ...")
    assert table.listing(wanted).splitlines() == [
        f"vgg16, {name}, seed 0: open  {wanted.folder}/vgg16_{name}" for name in ("bn", "deconv")
    ]
    assert table.make(wanted) and trained == ["vgg16_bn", "vgg16_deconv"]
    text = (wanted.folder / "table.md").read_text()
    scores = [last_score(wanted.folder / name) for name in trained]
    assert text.startswith("# CIFAR-10, 1 epoch: top-1 accuracy in %\n") and wanted.command in text
    assert row(text, "VGG-16") == ["14.12 → 74.18", *(f"{100 * score:.2f}" for score in scores)]
    assert row(text, "DPN-92") == ["34.00 → 53.02", "not measured", "not measured"]
    content = json.loads((wanted.folder / "table.json").read_text())
    ours = content["rows"][0]["ours"]["deconv"]
    assert content["rows"][0]["paper_percent"] == {"bn": [14.12], "deconv": [74.18]}
    one = ours["runs"][0]
    assert (ours["last_mean"], one["last"], one["state"], one["steps"]) == (scores[1], scores[1], "done", 5)
    assert one["training_seconds"] > 0 and one["parameters"] > 10_000
    assert one["run"].endswith("cifar10_1ep/vgg16_deconv")
    assert (wanted.folder / "curves.png").stat().st_size > 10_000
    capsys.readouterr()
    assert table.make(wanted) and len(trained) == 2
    assert capsys.readouterr().out == f"\n2 of 2 cells are trained: {wanted.folder / 'table.md'}\n"
    assert (wanted.folder / "table.md").read_text() == text
    assert table.listing(wanted).startswith(f"vgg16, bn, seed 0: done, {100 * scores[0]:.2f} %")


def test_the_command_of_a_cell_trains_the_same(ask: Any):
    (cell,) = cells(ask(variants=["deconv:optim.lr=0.02,optim.milestones=[]"], overrides=["batch_size=10"]), ["vgg16"])
    program, script, config, *rest = shlex.split(cell.command)
    keys = rest[: rest.index("--work-dir")]
    assert (program, script) == ("python", "tools/train.py")
    assert rest[-4:] == ["--work-dir", str(cell.run), "--resume", "auto"]
    assert load(config, keys, ClassifyConfig).text == cell.loaded.text
    assert (cell.loaded.config.optim.lr, cell.loaded.config.batch_size) == (0.02, 10)


@pytest.mark.usefixtures("undrawn")
def test_several_seeds_have_a_mean_and_a_deviation(ask: Any, trained: list[str]):
    assert table.make(ask(variants=["bn:optim.lr=0.1,optim.momentum=0"]))
    wanted = ask(variants=["bn:optim.lr=0.1,optim.momentum=0"], seeds=[0, 1])
    assert table.make(wanted)
    assert trained == ["vgg16_bn_optim.lr_0.1_optim.momentum_0", "vgg16_bn_optim.lr_0.1_optim.momentum_0_seed1"]
    a, b = (100 * last_score(wanted.folder / name) for name in trained)
    found = row((wanted.folder / "table.md").read_text(), "VGG-16")[1]
    assert found == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"


@pytest.mark.usefixtures("undrawn")
def test_a_signal_stops_the_table_and_the_next_start_goes_on(ask: Any, tmp_path: Path, monkeypatch, capsys):
    wanted = ask("vgg16", "vgg11", variants=["deconv"])
    whole = request(tmp_path / "whole", networks=["vgg16"], variants=["deconv"], configs=wanted.configs)
    real, calls = losses.build, []

    def build(*args: Any) -> Any:
        function = real(*args)

        def loss(*more: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*more)

        return loss

    with monkeypatch.context() as patched:
        patched.setattr(losses, "build", build)
        assert not table.make(wanted)
    assert len(calls) == 3 and "the same command goes on" in capsys.readouterr().out
    text = (wanted.folder / "table.md").read_text()
    assert row(text, "VGG-16")[1] == "not measured (stopped in epoch 0.60)" and "| stopped |" in text
    assert "vgg16, deconv, seed 0: partly, epoch 0.60" in table.listing(wanted)
    assert table.make(wanted)
    out = capsys.readouterr().out
    assert "resumed after step 3 of 5" in out and "[2/2] vgg11, deconv, seed 0" in out
    assert table.make(whole)
    assert look(cells(wanted, ["vgg16"])[0]).last == look(cells(whole, ["vgg16"])[0]).last


@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_fails_is_named_and_the_others_are_trained(ask: Any, monkeypatch: pytest.MonkeyPatch):
    wanted = ask(variants=["bn:optim.lr=1e30", "deconv"])
    assert not table.make(wanted)
    cell, good = row((wanted.folder / "table.md").read_text(), "VGG-16")[1:]
    assert cell == "failed: the loss became nan at step 2" and float(good) >= 0
    runs = json.loads((wanted.folder / "table.json").read_text())["rows"][0]["ours"]["bn:optim.lr=1e30"]["runs"]
    assert runs[0]["state"] == "failed" and "try a lower optim.lr" in runs[0]["reason"]

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. | Tried to allocate\nmore")

    monkeypatch.setattr(train, "run", short)
    assert not table.make(wanted)
    cell = row((wanted.folder / "table.md").read_text(), "VGG-16")[1]
    assert cell == r"failed: CUDA out of memory. \| Tried to allocate"


@pytest.mark.usefixtures("undrawn")
def test_other_settings_are_refused_before_anything_changes(ask: Any, trained: list[str]):
    wanted = ask(variants=["bn"])
    assert table.make(wanted)
    before = (wanted.folder / "table.md").read_text()
    with pytest.raises(UserError) as caught:
        table.make(ask("vgg11", "vgg16", variants=["bn"], overrides=["optim.lr=0.3"]))
    text = str(caught.value)
    assert f"{wanted.folder}/vgg16_bn: was trained with another configuration" in text
    assert "optim.lr: was 0.05, now 0.3" in text and "another --out" in text
    assert trained == ["vgg16_bn"] and (wanted.folder / "table.md").read_text() == before


@pytest.mark.usefixtures("undrawn")
def test_what_earlier_starts_made_stays_in_the_table(ask: Any, trained: list[str]):
    assert table.make(ask("vgg16", variants=["bn"])) and table.make(ask("vgg11", variants=["bn"]))
    folder = ask().folder
    text = (folder / "table.md").read_text()
    assert trained == ["vgg16_bn", "vgg11_bn"]
    assert row(text, "VGG-16")[1] == f"{100 * last_score(folder / 'vgg16_bn'):.2f}"
    assert row(text, "VGG-11") == ["–", f"{100 * last_score(folder / 'vgg11_bn'):.2f}"]
    with pytest.raises(UserError, match="vgg16_bn: was trained with another configuration"):
        look(cells(ask("vgg16", variants=["bn"], overrides=["batch_size=10"]), ["vgg16"])[0])
    assert table.make(ask("vgg11", variants=["deconv"], overrides=["batch_size=10"]))
    assert row((folder / "table.md").read_text(), "VGG-16")[1] == "not measured"


@pytest.mark.usefixtures("undrawn")
def test_variants_of_earlier_starts_stay_in_the_table(ask: Any, trained: list[str]):
    """With the same settings; else their column would be empty."""
    folder = ask().folder
    assert table.make(ask(variants=["bn", "bn:optim.lr=0.1"])) and table.make(ask(variants=["deconv"]))
    assert trained == ["vgg16_bn", "vgg16_bn_optim.lr_0.1", "vgg16_deconv"]
    text = (folder / "table.md").read_text()
    scores = [f"{100 * last_score(folder / name):.2f}" for name in (trained[2], *trained[:2])]
    assert "| ours: deconv | ours: bn | ours: bn:optim.lr=0.1 |" in text and row(text, "VGG-16")[1:] == scores
    content = json.loads((folder / "table.json").read_text())
    assert list(content["rows"][0]["ours"]) == ["deconv", "bn", "bn:optim.lr=0.1"]
    assert table.make(ask("vgg11", variants=["deconv_fast"], overrides=["batch_size=10"]))
    assert "| ours: deconv_fast |\n" in (folder / "table.md").read_text()


def test_networks_of_earlier_starts_stay_too(ask: Any, trained: list[str]):
    """Those that the paper's table does not have."""
    folder = ask().folder
    assert table.make(ask("vgg11", variants=["bn"])) and table.make(ask(variants=["bn"]))
    assert trained == ["vgg11_bn", "vgg16_bn"]
    scores = [f"{100 * last_score(folder / name):.2f}" for name in trained]
    text = (folder / "table.md").read_text()
    assert [row(text, name)[-1] for name in ("VGG-11", "VGG-16")] == scores
    names = [one["network"] for one in json.loads((folder / "table.json").read_text())["rows"]]
    assert names[-1] == "vgg11" and len(set(names)) == len(names)
    assert table.make(ask(variants=["deconv"], overrides=["batch_size=10"]))
    assert "VGG-11" not in (folder / "table.md").read_text(), "made with other settings"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": 3}', '{"rows": [{"ours": [4]}]}', '{"rows": [{"ours": {"": 1}}]}']
)
def test_a_table_json_of_another_program(ask: Any, trained: list[str], content: str):
    wanted = ask()
    wanted.folder.mkdir()
    (wanted.folder / "table.json").write_text(content)
    with pytest.raises(UserError, match="table.json: not a table that this program has written"):
        table.make(wanted)
    assert not trained and (wanted.folder / "table.json").read_text() == content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "--epochs: found 0, expected at least 1"),
        ({"data": "mnist"}, "--networks: the paper has no table of mnist"),
        ({"variants": ["bn", "bn"]}, "--variants: bn is there twice"),
        ({"variants": ["bn:optim.lr"]}, "--variants: found 'bn:optim.lr', expected NAME or NAME:key=value"),
        ({"variants": [":optim.lr=1"]}, "--variants: found ':optim.lr=1'"),
        ({"variants": ["bn:norm.name=gn"]}, "--variants: bn:norm.name=gn: norm.name differs from cell to cell"),
        ({"variants": ["bn:norm={name: gn}"]}, "norm.name differs from cell to cell .* set it with --variants"),
        ({"networks": ["vgg16", "vgg16"]}, "--networks: vgg16 is there twice"),
        ({"seeds": [1, 1]}, "--seeds: 1 is there twice"),
        ({"overrides": ["length=3 epochs"]}, "--set: length differs .* set it with --epochs"),
        ({"overrides": ["runtime.seed=3"]}, "set it with --seeds"),
        ({"overrides": ["data.name=mnist"]}, "set it with --data"),
        ({"overrides": ["model.name=resnet18"]}, "set it with --networks"),
        ({"variants": ["bn:model.name=resnet18"]}, "set it with --networks"),
    ],
)
def test_requests_that_make_no_sense(tmp_path: Path, options: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        request(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"networks": ["vgg61"]}, r"vgg61_cifar10.yaml: no such config, so vgg61 .* there are vgg11, vgg16"),
        ({"data": "svhn"}, "none for this data set"),
        ({"variants": ["bm"]}, "bm"),
        ({"overrides": ["optim.lrr=1"]}, "optim.lrr: unknown key"),
    ],
)
def test_mistakes_show_before_anything_is_trained(ask: Any, trained: list[str], options: dict[str, Any], said: str):
    wanted = ask(*options.pop("networks", ["vgg16"]), **options)
    with pytest.raises(UserError, match=said):
        table.make(wanted)
    assert not trained and not wanted.folder.exists()


def test_without_the_configs_of_a_checkout(tmp_path: Path):
    with pytest.raises(UserError, match="none: no such folder; start this from a checkout, which has the configs"):
        cells(request(tmp_path, networks=["vgg16"], configs=tmp_path / "none"), ["vgg16"])


def test_a_variants_commas_divide_keys_but_not_lists(tmp_path: Path):
    text = "deconv:norm.block=32,optim.milestones=['1 epoch', '2 epochs'],norm.n_iter=3"
    (variant,) = request(tmp_path, variants=[text]).variants
    assert variant.overrides == (
        "norm.name=deconv",
        "norm.block=32",
        "optim.milestones=['1 epoch', '2 epochs']",
        "norm.n_iter=3",
    )
    assert variant.slug == "deconv_norm.block_32_optim.milestones_1_epoch_2_epochs_norm.n_iter_3"


def test_defaults_are_the_papers(tmp_path: Path):
    one, two = request(tmp_path), request(tmp_path, data="imagenet")
    assert (one.epochs, one.folder.name, [v.text for v in one.variants]) == (1, "cifar10_1ep", ["bn", "deconv"])
    assert len(one.networks) == 10 and one.networks[0] == "vgg16" and one.networks[-1] == "efficientnet_b0"
    assert (two.epochs, two.networks) == (90, ("vgg11", "resnet18", "densenet121"))
    assert len(cells(one, one.networks)) == 20 and len(cells(two, two.networks)) == 6  # of the configs that we bring


def test_the_papers_figures():
    assert paper.figures("vgg16", "cifar10", 1) == {"bn": (14.12,), "deconv": (74.18,)}
    assert paper.figures("pnasnet_a", "cifar100", 20) == {"bn": (44.60,), "deconv": (55.65,)}
    assert paper.figures("efficientnet_b0", "cifar100", 100) == {"bn": (59.09,), "deconv": (62.37,)}
    assert paper.figures("resnet18", "imagenet", 90)["deconv, 2024"] == (71.58, 90.27)
    assert paper.figures("vgg16", "cifar10", 5) == paper.figures("vgg11", "cifar10", 1) == {}
    assert paper.figures("vgg16", "imagenet", 90) == paper.figures("vgg11", "imagenet", 10) == {}
    for network in paper.networks("cifar10"):
        for data in ("cifar10", "cifar100"):
            pairs = [paper.figures(network, data, epochs) for epochs in (1, 20, 100)]
            assert all(pair["bn"] < pair["deconv"] for pair in pairs)  # the paper's claim, in all 60 cells
            assert [pair["deconv"] for pair in pairs] == sorted(pair["deconv"] for pair in pairs)


def test_another_data_set_has_no_rows_of_the_paper(tmp_path: Path):
    wanted = request(tmp_path, data="mnist", networks=["lenet"])
    assert len(cells(wanted, ["lenet"])) == 2
    text = table_files.markdown(wanted, {})
    assert row(text, "lenet") == ["–", "not measured", "not measured"] and "VGG" not in text


def test_table_2_has_two_accuracies_and_the_reproduction(tmp_path: Path):
    wanted = request(tmp_path, data="imagenet", networks=["vgg11"], variants=["deconv"], seeds=[0, 1])
    loaded: Any = None
    known = {}
    for seed, top in ((0, 0.70), (1, 0.72)):
        cell = Cell("vgg11", wanted.variants[0], seed, tmp_path / str(seed), loaded, "")
        known[cell.key] = Outcome(cell, "done", last=top, scalars={"top5": 0.9}, best=top, best_step=1, step=1)
    text = table_files.markdown(wanted, known)
    assert row(text, "VGG-11") == [
        "69.02 / 88.63",
        "70.38 / 89.81 → 71.95 / 90.49",
        "71.95 / 90.60",
        "71.00 ± 1.41 / 90.00 ± 0.00",
    ]
    assert row(text, "ResNet-18") == ["–", "69.76 / 89.08 → 71.24 / 90.14", "71.58 / 90.27", "not measured"]
    assert "top-1 / top-5 accuracy" in text and "arXiv 2410.01189" in text and "Table 2" in text
    del known["vgg11", "deconv", 1]
    assert row(table_files.markdown(wanted, known), "VGG-11")[3] == "70.00 / 90.00 (1 of 2 seeds)"


def test_the_program(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/table1.py", "--list", "--out", str(tmp_path), "--networks", "dpn92"])
    assert table1.main() == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1] == f"dpn92, deconv, seed 0: open  {tmp_path}/cifar10_1ep/dpn92_deconv"
    monkeypatch.setattr(table, "make", lambda wanted: wanted.command == "python tools/table1.py --epochs 3")
    monkeypatch.setattr(sys, "argv", ["tools/table1.py", "--epochs", "3"])
    assert table1.main() == 0
    monkeypatch.setattr(sys, "argv", ["tools/table1.py", "--epochs", "4"])
    assert table1.main() == 1


def both(folder: Path, configs: Path) -> None:
    """Make a table of two cells in one of several processes; its curves are not looked at."""
    table_files.draw = lambda *_: None
    wanted = request(folder, networks=["vgg16"], variants=["bn", "deconv"], configs=configs)
    assert table.make(wanted)


def test_two_processes_make_one_table(tmp_path: Path, configs: Path):
    in_processes(both, tmp_path, configs)
    text = (tmp_path / "cifar10_1ep/table.md").read_text()
    bn, deconv = (last_score(tmp_path / f"cifar10_1ep/vgg16_{name}") for name in ("bn", "deconv"))
    assert row(text, "VGG-16")[1:] == [f"{100 * bn:.2f}", f"{100 * deconv:.2f}"] and "M | vgg16_deconv |" in text
