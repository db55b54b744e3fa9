"""Scores of a checkpoint lie beside it and say whose they are."""

from pathlib import Path

import pytest

from engine import images
from engine.errors import UserError
from engine.images import check_results_writable
from engine.score_files import described, scores_folder


@pytest.mark.parametrize(
    ("split", "name"), [("val", "scores_val"), ("val/rain", "scores_val_rain"), ("/data/x/", "scores_data_x")]
)
def test_a_split_may_be_a_folder_of_a_folder(split: str, name: str) -> None:
    assert scores_folder(Path("runs/a/best.pt"), split) == Path("runs/a", name)


def test_what_is_said_of_them() -> None:
    found = described(Path("runs/a/best.pt"), "val", ["data.root=x"], "its mirror image")
    assert found == {
        "of": {
            "checkpoint": "runs/a/best.pt",
            "split": "val",
            "changes": ["data.root=x"],
            "averaged_over": "its mirror image",
        }
    }
    assert described(Path("best.pt"), "val", [])["of"]["averaged_over"] is None


def test_a_folder_in_place_of_a_file_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        check_results_writable(tmp_path / "best.pt", None, tmp_path)


def test_where_all_goes_to_other_folders_the_checkpoints_own_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(images, "check_writable", asked.append)
    check_results_writable(tmp_path / "best.pt", tmp_path / "out", None)
    check_results_writable(tmp_path / "best.pt", tmp_path / "out", tmp_path / "other/s.json")
    check_results_writable(tmp_path / "best.pt", None, None)
    assert [path.name for path in asked] == ["out", "out", "out", "other", tmp_path.name, tmp_path.name]
