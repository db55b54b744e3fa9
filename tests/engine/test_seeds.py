"""Groups of trainings that differ in their seed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from engine import seeds
from engine.errors import UserError

FIRST = {"a0": [0.2, 0.4, 0.50], "a1": [0.3, 0.5, 0.54], "a2": [0.2, 0.5, 0.52]}
OTHER = {"b0": [0.4, 0.55, 0.60], "b1": [0.3, 0.51, 0.61]}


def runs(folder: Path, scores: Mapping[str, Sequence[float | None]], every: int = 10) -> list[Path]:
    for name, values in scores.items():
        (folder / name).mkdir(parents=True)
        rows = [
            {"kind": "eval", "step": every * (i + 1), "epoch": (i + 1) / 2, "score": s} for i, s in enumerate(values)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / name for name in scores]


def test_mean_deviation_and_significance(tmp_path: Path) -> None:
    found = seeds.groups([*runs(tmp_path, FIRST), *runs(tmp_path, OTHER)], ["bn", "bn", "bn", "deconv", "deconv"])
    text = seeds.compare(found, tmp_path / "seeds.png")
    head, bn, deconv, drawn = text.splitlines()
    assert "reaches 52.00% in epoch" in head and drawn == f"drawn in {tmp_path / 'seeds.png'}"
    assert bn.split() == ["bn", "3", "1.5", "52.00%", "+-", "2.00", "1.5"]
    p = ttest_ind([0.50, 0.54, 0.52], [0.60, 0.61], equal_var=False).pvalue
    deviation = 100 * np.std([0.60, 0.61], ddof=1)
    assert deconv.split() == ["deconv", "2", "1.5", "60.50%", "+-", f"{deviation:.2f}", "+8.50", f"{p:.3f}", "1"]
    assert (tmp_path / "seeds.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_tells_what_the_score_is_and_counts_whole_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, data, **_: drawn.append(self) or data.write(b"x"))
    found = {"bn": runs(tmp_path, {"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]})}
    seeds.compare(found, tmp_path / "seeds.png")
    for file in tmp_path.glob("*/metrics.jsonl"):
        file.write_text(file.read_text().replace('"kind"', '"measure": "mIoU", "kind"'))
    seeds.compare(found, tmp_path / "seeds.png")
    axes = [figure.axes[0] for figure in drawn]
    assert [each.get_ylabel() for each in axes] == ["score, %", "mIoU, %"]
    assert all(tick == round(tick) for tick in axes[0].get_xticks())


def test_a_shorter_group_is_compared_where_both_were_evaluated(tmp_path: Path) -> None:
    found = {"bn": runs(tmp_path, FIRST), "one": runs(tmp_path, {"c": [0.4, 0.5]})}
    line = seeds.compare(found, tmp_path / "seeds.png").splitlines()[2]
    gap = 100 * (0.5 - np.mean([0.4, 0.5, 0.5]))
    assert line.split() == ["one", "1", "1", "50.00%", f"{gap:+.2f}", "(epoch", "1)", "-", "-"]


def test_runs_that_are_scored_before_their_end_are_told(tmp_path: Path) -> None:
    good, bad, longer = runs(tmp_path, {"a0": [0.5, 0.6], "a1": [0.5, None], "b0": [0.5, 0.6, 0.7]})
    assert seeds.cut_short({"a": [good], "b": [longer]}) == []
    end = "; the score is that of step 10, the last one of all its runs"
    assert seeds.cut_short({"a": [good, bad]}) == [
        f"note: a: {good} goes on to step 20{end}",
        f"note: a: the evaluation of {bad} after step 20 was not finite{end}",
    ]
    assert seeds.cut_short({"a": [good, longer]}) == [
        f"note: a: {longer} goes on to step 30; the score is that of step 20, the last one of all its runs"
    ]


def test_only_common_evaluations_count(tmp_path: Path) -> None:
    left, right = runs(tmp_path, {"a": [0.1, 0.2, 0.3]}), runs(tmp_path, {"b": [0.5]}, every=20)
    assert seeds.course("x", [*left, *right]).scores == ((0.2, 0.5),)


def test_mistakes(tmp_path: Path) -> None:
    left, right = runs(tmp_path, {"a": [0.1]}), runs(tmp_path, {"b": [0.5]}, every=7)
    with pytest.raises(UserError, match="x: .* were never evaluated at the same step"):
        seeds.course("x", [*left, *right])
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="c: no evaluation in .*metrics.jsonl; expected"):
        seeds.course("x", [tmp_path / "c"])


def test_one_run_is_not_two_seeds(tmp_path: Path) -> None:
    a, b, c, d = runs(tmp_path, {"a": [0.5], "b": [0.6], "c": [0.7], "d": [0.8]})
    with pytest.raises(UserError, match="x/../b: is given twice as a run of 'y'"):
        seeds.groups([a, b, tmp_path / "x/../b"], ["x", "y", "y"])
    assert len(seeds.groups([a, a], ["x", "y"])) == 2
    for run, seed in ((a, 0), (b, 0), (c, 1), (d, 2)):
        (run / "config.yaml").write_text(f"task: seg\nbatch_size: 2\nruntime: {{seed: {seed}}}\n")
    assert seeds.same_seeds({"x": [a, c], "y": [b, d]}) == []
    (note,) = seeds.same_seeds({"x": [a, b, c], "y": [d]})
    assert note.startswith("note: x has several runs of seed 0;")


def test_runs_of_one_name_that_differ_in_more_than_the_seed_are_told(tmp_path: Path) -> None:
    a, b, c = runs(tmp_path, {"a": [0.5], "b": [0.6], "c": [0.7]})
    text = "task: seg\nbatch_size: 2\noptim: {{lr: {1}}}\nlength: {0}\nruntime: {{seed: {2}, workers: {3}}}\n"
    (a / "config.yaml").write_text(text.format("2 epochs", 0.1, 0, 4))
    (b / "config.yaml").write_text(text.format("2 epochs", 0.1, 1, 0))
    (c / "config.yaml").write_text(text.format("3 epochs", 0.2, 2, 4))
    assert seeds.unlike({"x": [a, b], "y": [c]}) == []
    (note,) = seeds.unlike({"x": [a, b, c]})
    assert note.startswith(f"note: x: from {a} to {c} more changes than the seed: ")
    assert note.endswith(": optim.lr: was 0.1, now 0.2; length: was 2 epochs, now 3 epochs")


def test_without_deviation_there_is_no_p(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    left, right = runs(tmp_path, {"a": [0.5], "b": [0.5]}), runs(tmp_path, {"c": [0.6], "d": [0.6]})
    line = seeds.compare({"x": left, "y": right}, tmp_path / "seeds.png").splitlines()[2]
    assert line.split()[4:8] == ["+-", "0.00", "+10.00", "-"] and not recwarn.list


def test_a_p_that_rounds_to_0_is_below_the_smallest_that_is_shown(tmp_path: Path) -> None:
    sure = runs(tmp_path, {"a": [0.500], "b": [0.501], "c": [0.499]}), runs(tmp_path, {"d": [0.9], "e": [0.901]})
    line = seeds.compare({"x": sure[0], "y": sure[1]}, tmp_path / "seeds.png").splitlines()[2]
    assert line.split()[6:8] == ["+40.05", "<0.001"]
