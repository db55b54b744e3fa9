"""Grids of trainings: variants, what folders tell, and going on."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import grid, runs
from engine.config import Length, Loaded
from engine.errors import UserError
from engine.grid import Outcome
from tests.engine import toy


@dataclass(frozen=True)
class Cell:
    name: str
    run: Path
    loaded: Loaded[Any]

    @property
    def key(self) -> str:
        return self.name


def cell(folder: Path, name: str = "a", **options: Any) -> Cell:
    cfg = toy.config(**options)
    return Cell(name, folder / name, Loaded(cfg, {}, ""))


def train(one: Cell) -> Any:
    """As the trainers do, the config beside the run."""
    one.run.mkdir(parents=True, exist_ok=True)
    result = toy.train(one.loaded.config, one.run)
    (one.run / "config.yaml").write_text(one.loaded.config.model_dump_json())
    return result


def accept(where: str, keys: Any) -> None:
    pass


def test_a_variant_is_a_norm_and_keys():
    found = grid.variant("deconv:norm.block=32, optim.milestones=[1 epoch, 2 epochs]", "--norms", accept)
    assert found.overrides == ("norm.name=deconv", "norm.block=32", "optim.milestones=[1 epoch, 2 epochs]")
    assert found.slug == "deconv_norm.block_32_optim.milestones_1_epoch_2_epochs"


def test_commas_inside_brackets_of_brackets_part_no_keys():
    found = grid.variant("deconv:norm.overrides={a: {n_iter: 3}, b: {x: [1, 2]}},optim.lr=1", "--norms", accept)
    assert found.overrides[1:] == ("norm.overrides={a: {n_iter: 3}, b: {x: [1, 2]}}", "optim.lr=1")


@pytest.mark.parametrize("text", ["", ":a=1", "bn:lr"])
def test_other_words_are_no_variant(text: str):
    with pytest.raises(UserError, match="expected NAME or NAME:key=value"):
        grid.variant(text, "--norms", accept)


def test_a_thing_named_twice():
    with pytest.raises(UserError, match="--batch: 2 is there twice"):
        grid.check_distinct("--batch", [1, 2, 2])


def test_a_folder_tells_what_was_done(tmp_path: Path):
    one = cell(tmp_path, steps=4, optim__schedule="constant")
    assert grid.look(one).state == "open"
    train(one)
    found = grid.look(one)
    assert (found.state, found.step) == ("done", 4)
    assert found.last is not None and found.best is not None and found.best >= found.last
    assert found.seconds is not None and found.memory is not None and found.memory > 1e7
    assert "IoU/road" in found.scalars
    longer = cell(tmp_path, steps=8, optim__schedule="constant")
    assert grid.look(longer).state == "partly"
    assert grid.listing([longer, cell(tmp_path, "b")]) == (
        f"a: partly, epoch 0.80  {one.run}\nb: open  {tmp_path / 'b'}"
    )


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_a_shorter_schedule_is_not_the_beginning_of_a_longer_one(tmp_path: Path, schedule: str):
    train(cell(tmp_path, steps=4, optim__schedule=schedule))
    with pytest.raises(UserError, match=f"length: was 4 steps, now 8 steps, and the {schedule} schedule of a new one"):
        grid.look(cell(tmp_path, steps=8, optim__schedule=schedule))
    asked = cell(tmp_path, steps=4, optim__schedule=schedule).loaded.config
    epochs = asked.model_copy(update={"length": Length(2, "epochs")})
    with pytest.raises(UserError, match="length: was 4 steps, now 2 epochs"):
        grid.look(Cell("a", tmp_path / "a", Loaded(epochs, {}, "")))


def test_an_end_without_a_score_has_failed_and_says_why(tmp_path: Path):
    one = cell(tmp_path, steps=4, report__eval_every=Length(2, "steps"))
    train(one)
    path = one.run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4]
    for row in rows:
        if row["kind"] == "eval" and row["step"] == 4:
            row["score"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = grid.look(one)
    assert found.state == "failed" and "last evaluation are not finite" in found.reason
    assert runs.last_evaluation(one.run)["score"] is None and runs.evaluations(one.run)[-1]["step"] == 2


def test_a_length_in_epochs(tmp_path: Path):
    one = cell(tmp_path, steps=5)
    train(one)
    epoch = toy.config().model_copy(update={"length": type(one.loaded.config.length)(1, "epochs")})
    assert grid.look(Cell("a", one.run, Loaded(epoch, {}, ""))).state == "done"


def test_a_run_of_another_configuration_is_not_taken(tmp_path: Path):
    train(cell(tmp_path, steps=2))
    with pytest.raises(UserError, match=r"optim.lr: was 0.1, now 0.3(.|\n)*choose another --out"):
        grid.look(cell(tmp_path, steps=2, optim__lr=0.3))


def test_the_middle_of_a_longer_run_or_another_precision_is_not_taken(tmp_path: Path):
    train(cell(tmp_path, steps=4, report__eval_every=Length(2, "steps")))
    with pytest.raises(UserError, match="length: was 4 steps, now 2 steps, and the middle of a longer schedule"):
        grid.look(cell(tmp_path, steps=2, report__eval_every=Length(2, "steps")))
    with pytest.raises(UserError, match="runtime.amp: was none, now bf16"):
        grid.look(cell(tmp_path, steps=4, runtime__amp="bf16"))
    assert grid.look(cell(tmp_path, steps=4, runtime__threads=1)).state == "done"


def test_only_what_is_missing_is_trained_and_all_is_written(tmp_path: Path):
    todo = [cell(tmp_path, name) for name in "abc"]
    known: dict[Any, Outcome[Cell]] = {one.key: Outcome(one, "open") for one in todo}
    known["b"] = Outcome(todo[1], "done")
    written, said = [], []

    def fake(one: Cell) -> tuple[Outcome[Cell], bool]:
        return Outcome(one, "failed" if one.name == "a" else "done"), False

    stopped = grid.train_missing(
        todo, known, fake, lambda: written.append([one.state for one in known.values()]), said.append
    )
    assert not stopped
    assert written == [["open", "done", "open"], ["failed", "done", "open"], ["failed", "done", "done"]]
    assert [line.strip().split(" ")[0] for line in said] == ["[1/3]", "[3/3]"]


def test_a_signal_ends_it(tmp_path: Path):
    todo = [cell(tmp_path, name) for name in "ab"]
    known: dict[Any, Outcome[Cell]] = {one.key: Outcome(one, "open") for one in todo}
    assert grid.train_missing(todo, known, lambda one: (Outcome(one, "partly"), True), lambda: None, lambda _: None)
    assert [one.state for one in known.values()] == ["partly", "open"]


def test_words_for_tables():
    assert grid.mean_and_deviation([0.5]) == "50.00" and grid.mean_and_deviation([0.4, 0.6]) == "50.00 ± 14.14"
    assert grid.short("no | room; try less") == "no | room" and len(grid.short("x" * 300)) == 140
    assert grid.table_head(["a", "b"]) == ["| a | b |", "| --- | ---: |"]
    variant = grid.variant("deconv:norm.overrides={'a.*|b.*': {n_iter: 1}}", "--variants", lambda *_: None)
    row = grid.table_row(["ours: " + variant.text, "1"])
    assert row == r"| ours: deconv:norm.overrides={'a.*\|b.*': {n_iter: 1}} | 1 |"
    assert len(re.split(r"(?<!\\)\|", row)) == 4, "two cells"
