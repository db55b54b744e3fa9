"""A user's images labelled: what is written where, and that no bad input stops the rest."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import checkpoint, images
from engine.errors import UserError
from engine.images import show
from seg import draw, evaluate, labels
from seg import label_files as module
from seg.averaging import Views, predictor_of
from seg.label_files import Summary, label_files
from seg.models import from_checkpoint
from tools import predict as program

RAMP = np.stack(np.meshgrid(np.arange(0, 250, 10), np.arange(0, 240, 20)), -1).astype(np.uint8)
RGB = np.dstack([RAMP, RAMP[..., :1] // 2])  # 12 x 25, no two pixels alike


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(RGB)).save(path, **options)
    return path


def fake(image: np.ndarray) -> np.ndarray:
    """Train ids from the red channel."""
    return (image[..., 0] % 19).astype(np.uint8)


def run(inputs: list[Any], out: Path, *kinds: str, **options: Any) -> tuple[Summary, list[str]]:
    said: list[str] = []
    return label_files(fake, inputs, out, kinds or ("labels",), say=said.append, **options), said


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_label_files_writes_all_kinds(tmp_path: Path) -> None:
    save(tmp_path / "in/ulm/ulm_000001_000019_leftImg8bit.png")
    summary, said = run([tmp_path / "in"], tmp_path / "out", "labels", "color", "overlay")
    assert str(summary) == "1 image labelled" and "25 x 12" in said[0]
    stem = "ulm/ulm_000001_000019_leftImg8bit"
    expected = [f"color/{stem}_color.png", f"labels/{stem}_labelIds.png", f"overlay/{stem}_overlay.png"]
    assert tree(tmp_path / "out") == expected
    color, label, overlay = (Image.open(tmp_path / "out" / name) for name in expected)
    ids = fake(RGB)
    assert label.mode == "L" and np.array_equal(np.asarray(label), labels.to_label_ids(ids))
    assert color.mode == "RGB" and np.array_equal(np.asarray(color), labels.TRAIN_COLORS[ids])
    assert overlay.mode == "RGB" and overlay.height > 12


def test_the_official_evaluation_pairs_the_labels(tmp_path: Path, sample_root: Path) -> None:
    from seg.evaluate import pair_files

    run([sample_root / "leftImg8bit/val"], tmp_path, "labels", "color", "overlay")
    pairs = pair_files(tmp_path / "labels", sample_root / "gtFine/val")
    assert len(pairs) == 2
    for prediction, truth in pairs:
        assert prediction.name.startswith(truth.name.removesuffix("_gtFine_labelIds.png"))


def test_one_bad_file_stops_nothing(tmp_path: Path) -> None:
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/z.png")
    (tmp_path / "in/m.jpg").write_text("hello")
    (tmp_path / "in/n.png").touch()
    summary, said = run([tmp_path / "in", tmp_path / "typo.png"], tmp_path / "out")
    assert summary.done == 2 and len(summary.problems) == 3 and len(said) == 4
    assert tree(tmp_path / "out") == ["labels/a_labelIds.png", "labels/z_labelIds.png"]
    text = str(summary)
    assert text.startswith("2 images labelled, 3 problems:\n")
    assert all(name in text for name in ("typo.png", "m.jpg", "n.png"))


def test_a_failing_prediction_stops_nothing_either(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", Image.fromarray(RGB[:5]))

    def predict(image: np.ndarray) -> np.ndarray:
        if len(image) == 12:
            raise UserError("The network's output is not finite.")
        return fake(image)

    summary = label_files(predict, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out", say=lambda _: None)
    assert (summary.done, summary.problems) == (1, [f"{tmp_path / 'a.png'}: The network's output is not finite."])


@pytest.mark.parametrize("out", ["in/out", "in", "in/deep/out", "other"])
def test_own_outputs_are_not_read_again(tmp_path: Path, out: str) -> None:
    save(tmp_path / "in/a.png")
    for _ in range(3):
        for inputs in ([tmp_path / "in"], [f"{tmp_path}/in/**/*.png"], [*(tmp_path / "in").iterdir()]):
            summary, said = run(inputs, tmp_path / out, "labels", "color", "overlay")
            assert summary.done == len(said[-1:]) == 1 and not summary.problems
            assert len(said) == 1 or (len(said) == 2 and said[0].startswith("left out as outputs of this program: "))
    assert len(tree(tmp_path)) == 4


def test_outputs_of_an_earlier_run_are_left_out_and_told(tmp_path: Path) -> None:
    save(tmp_path / "in/a.png")
    run([tmp_path / "in"], tmp_path / "in/before", "labels", "overlay")
    summary, said = run([tmp_path / "in"], tmp_path / "after")
    assert summary.done == 1 and not summary.problems
    example = tmp_path / "in/before/labels/a_labelIds.png"
    assert said[0] == f"left out as outputs of this program: 2, such as {example}"
    assert run([tmp_path / "in", example], tmp_path / "named")[0].done == 2, "named by itself it is an image"


def test_photos_in_a_folder_of_outputs_are_labelled(tmp_path: Path) -> None:
    for name in ("out/labels/a.png", "out/overlay/b_color.png"):
        save(tmp_path / name)
    for _ in range(2):
        assert run([tmp_path / "out"], tmp_path / "out")[0].done == 2
    own = tmp_path / "out/labels/labels/a_labelIds.png"
    summary, _ = run([own, tmp_path / "out/labels/a.png"], tmp_path / "out")
    problem = f"{own}: lies where this program writes, by its name an output; left out, copy it elsewhere."
    assert (summary.done, summary.problems) == (1, [problem])


def test_nothing_but_own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "out/color/a_color.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="out/color: only outputs of this program, which are left out"):
        run(["out/color"], tmp_path / "out")


def test_two_inputs_of_one_name_get_two_outputs(tmp_path: Path) -> None:
    save(tmp_path / "a/x.png")
    save(tmp_path / "b/x.png", Image.fromarray(RGB[:5]))
    run([tmp_path / "a/x.png", tmp_path / "b/x.png"], tmp_path / "out")
    assert tree(tmp_path / "out") == ["labels/a/x_labelIds.png", "labels/b/x_labelIds.png"]
    assert Image.open(tmp_path / "out/labels/b/x_labelIds.png").height == 5


def test_odd_names_are_kept_and_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [os.fsdecode(b"in/caf\xe9.png"), "in/new\nline.png", "in/東京 [1].png", "in/%s {}.png"]:
        save(tmp_path / name)
    summary = label_files(fake, [tmp_path / "in"], tmp_path / "out")
    assert summary.done == 4 and not summary.problems
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 4 and "new\\nline.png" in said and "caf\\udce9" in said
    assert (tmp_path / "out/labels" / os.fsdecode(b"caf\xe9_labelIds.png")).is_file()
    assert show("tab\there") == "tab\\there"


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    picture = save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no\*: no such file.*; .*typo: no such file"):
        run([tmp_path / "no*", tmp_path / "typo"], tmp_path / "out")
    with pytest.raises(UserError, match=r"Cannot save colour; choose from labels, color, overlay"):
        run([picture], tmp_path / "out", "labels", "colour")
    with pytest.raises(UserError, match="Cannot save nothing"):
        label_files(fake, [picture], tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    picture = save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"{re.escape(str(picture))}: cannot write there \(File exists\)"):
        run([picture], picture)
    with pytest.raises(UserError, match=r"below: cannot write there \(Not a directory\)"):
        run([picture], picture / "below")


def test_permissions(tmp_path: Path) -> None:
    picture, secret = save(tmp_path / "a.png"), save(tmp_path / "b.png")
    secret.chmod(0)
    if os.access(secret, os.R_OK):
        pytest.skip("this user (root) may read and write everything")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(UserError, match="closed: cannot write there .Permission denied"):
        run([picture], closed)
    summary, _ = run([picture, secret], tmp_path / "out")
    assert summary.problems == [f"{secret}: cannot be read (Permission denied)."]


def test_a_file_that_may_not_be_opened_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, secret = save(tmp_path / "a.png"), save(tmp_path / "b.png")
    real = open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(images, "open", refuse, raising=False)
    summary, _ = run([picture, secret], tmp_path / "out")
    assert (summary.done, summary.problems) == (1, [f"{secret}: cannot be read (Permission denied)."])


def test_too_long_a_name_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "in" / ("x" * 250 + ".png"))
    save(tmp_path / "in/a.png")
    summary, _ = run([tmp_path / "in"], tmp_path / "out")
    assert summary.done == 1 and "cannot be written (File name too long)" in summary.problems[0]


def test_the_next_is_read_and_those_before_are_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [threading.Event() for _ in range(7)]
    written = [threading.Event() for _ in range(6)]
    for number in range(6):
        save(tmp_path / f"in/{number}.png", Image.fromarray(RGB[: number + 1]))

    def reading(path: Path, *limits: int) -> Any:
        read[int(path.stem)].set()
        return images.read_image(path, *limits)

    def writing(path: Path, *pixels: Any, **options: Any) -> None:
        images.write_png(path, *pixels, **options)
        written[int(path.name[0])].set()

    def predict(image: np.ndarray) -> np.ndarray:
        number = len(image) - 1
        assert number == 5 or read[number + 1].wait(10), "read ahead"
        assert number == 0 or written[number - 1].wait(10), "written while this one is labelled"
        assert not any(one.is_set() for one in read[number + 4 :]), "a few are read ahead, not all"
        return fake(image)

    monkeypatch.setattr(module, "read_image", reading)
    monkeypatch.setattr(module, "write_png", writing)
    said: list[str] = []
    assert label_files(predict, [tmp_path / "in"], tmp_path / "out", say=said.append).done == 6
    assert [line.partition(" ")[0] for line in said] == [f"[{number}/6]" for number in range(1, 7)]


def test_no_more_pixels_wait_than_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOM", RGB[..., 0].size)
    for number in range(8):
        save(tmp_path / f"in/{number}.png")
    labelled, written = [0], [0]

    def predict(image: np.ndarray) -> np.ndarray:
        assert labelled[0] - written[0] <= 1, "one fills the room"
        labelled[0] += 1
        return fake(image)

    def writing(path: Path, *pixels: Any, **options: Any) -> None:
        images.write_png(path, *pixels, **options)
        written[0] += 1

    monkeypatch.setattr(module, "write_png", writing)
    assert label_files(predict, [tmp_path / "in"], tmp_path / "out", say=lambda _: None).done == 8


def test_problems_of_all_kinds_come_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdef":
        save(tmp_path / f"in/{name}.png", Image.fromarray(RGB[:5]) if name == "c" else None)
    (tmp_path / "in/b.png").write_text("hello")

    def predict(image: np.ndarray) -> np.ndarray:
        if len(image) == 5:
            raise UserError("Out of memory.")
        return fake(image)

    def full(path: Path, *pixels: Any, **options: Any) -> None:
        if path.name.startswith("d"):
            raise UserError(f"{path}: cannot be written (No space left on device).")
        images.write_png(path, *pixels, **options)

    monkeypatch.setattr(module, "write_png", full)
    said: list[str] = []
    summary = label_files(predict, [tmp_path / "in"], tmp_path / "out", say=said.append)
    assert summary.done == 3 and [line.endswith("FAILED") for line in said] == [False, True, True, True, False, False]
    for problem, text in zip(
        summary.problems, ("b.png: not an im", "c.png: Out of", "d_labelIds.png: ca"), strict=True
    ):
        assert text in problem
    assert tree(tmp_path / "out") == [f"labels/{name}_labelIds.png" for name in "aef"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_labelled_before_the_end_is_whole(tmp_path: Path, error: type[BaseException]) -> None:
    for number in range(9):
        save(tmp_path / f"in/{number}.png")
    done: list[int] = []

    def predict(image: np.ndarray) -> np.ndarray:
        if len(done) == 5:
            raise error
        done.append(1)
        return fake(image)

    kinds = ("labels", "overlay")
    with pytest.raises(error):
        label_files(predict, [tmp_path / "in"], tmp_path / "out", kinds, say=lambda _: None)
    files = tree(tmp_path / "out")
    numbers = [name.removeprefix("labels/")[0] for name in files if name.startswith("labels/")]
    assert numbers == list("01234")[: len(numbers)] and (error is KeyboardInterrupt or len(numbers) == 5)
    assert files == [f"{kind}/{number}{module.KINDS[kind]}" for kind in kinds for number in numbers]
    for name in files:
        Image.open(tmp_path / "out" / name).load()
    assert not [one for one in threading.enumerate() if one.name.startswith(("ahead", "spread"))]


def test_the_limit_of_images_does_not_hold_for_the_words_of_a_legend() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with images._pil_limit(10):  # as while the next image is read
        assert draw.overlay(np.zeros((400, 2000, 3), np.uint8), np.full((400, 2000), 6, np.uint8)).shape[0] > 400
    assert before == Image.MAX_IMAGE_PIXELS


def test_confidence_is_grey_and_as_it_was_predicted(tmp_path: Path) -> None:
    def never(_: np.ndarray) -> np.ndarray:
        raise AssertionError

    def confident(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return fake(image), image[..., 1]

    picture = save(tmp_path / "a.png")
    kinds = ("confidence", "labels")
    options: dict[str, Any] = {"say": lambda _: None, "confident": confident}
    assert label_files(never, [picture], tmp_path / "out", kinds, **options).done == 1
    found = Image.open(tmp_path / "out/confidence/a_confidence.png")
    assert found.mode == "L" and np.array_equal(np.asarray(found), RGB[..., 1])
    ids = np.asarray(Image.open(tmp_path / "out/labels/a_labelIds.png"))
    assert np.array_equal(ids, labels.to_label_ids(fake(RGB)))
    with pytest.raises(ValueError, match="to save confidence, label_files needs the function `confident`"):
        label_files(fake, [picture], tmp_path / "out", kinds)
    with pytest.raises(UserError, match="only outputs of this program"):
        run([tmp_path / "out"], tmp_path / "other")


@pytest.mark.parametrize("options", [[], ["--scales", "0.75", "1", "--flip"]])
def test_the_program_saves_the_probability_of_the_predicted_class(
    tmp_path: Path, sample_root: Path, small_checkpoint: Path, options: list[str]
) -> None:
    picture = next((sample_root / "leftImg8bit/val").rglob("*.png"))
    words = [str(small_checkpoint), str(picture), "--out", str(tmp_path), "--save", "confidence", "labels", *options]
    assert program.main(words) == 0
    model, cfg, _ = from_checkpoint(small_checkpoint, ["runtime.device=cpu"])
    predictor = predictor_of(model, cfg, "cpu", Views((0.75, 1.0), True) if options else None)
    shares = predictor.probabilities(images.read_image(picture)).numpy()
    ids, found = (np.asarray(Image.open(next((tmp_path / kind).iterdir()))) for kind in ("labels", "confidence"))
    assert np.array_equal(ids, labels.to_label_ids(shares.argmax(0).astype(np.uint8)))
    assert found.dtype == np.uint8 and np.abs(found - 255 * shares.max(0)).max() <= 0.5001
    assert len(np.unique(found)) > 10


def test_the_program_averages_over_the_views_that_are_scored(
    tmp_path: Path, sample_root: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scales", "0.75", "1", "--flip", "--sliding-window"]
    images = str(sample_root / "leftImg8bit/val")
    assert program.main([str(small_checkpoint), images, "--out", str(tmp_path / "views"), *options]) == 0
    assert program.main([str(small_checkpoint), images, "--out", str(tmp_path / "plain")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "predictions averaged over: scale 0.75, 1; mirrored; blended sliding window"
    assert sum("averaged" in line for line in said) == 1
    scored = evaluate.evaluate_checkpoint(small_checkpoint, views=Views((0.75, 1.0), True, True))
    assert scored is not None
    found, plain = (
        evaluate.evaluate_folder(tmp_path / name / "labels", sample_root / "gtFine/val") for name in ("views", "plain")
    )
    assert np.array_equal(found.matrix, scored[0].matrix) and not np.array_equal(found.matrix, plain.matrix)


def test_views_that_make_no_sense_are_told_before_the_checkpoint_is_read(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = save(tmp_path / "a.png")
    assert program.main([str(small_checkpoint), str(picture), "--out", str(tmp_path / "o"), "--scales", "1", "1"]) == 2
    assert capsys.readouterr() == ("", "error: --scales: 1 1: the same scale twice; give it once\n")
    assert not (tmp_path / "o").exists()


def test_smoothing_is_refused_where_it_does_nothing(
    tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(small_checkpoint, weights_only=True)
    state["config"]["predict"]["smoothing"] = 0.4
    stored = tmp_path / "smooth.pt"
    checkpoint.save(stored, state)
    words = [str(stored), str(save(tmp_path / "a.png")), "--out", str(tmp_path / "o")]
    for override in ("predict.smoothing=0.4", "predict={smoothing: 0.4}"):
        assert program.main([*words, override]) == 2
        text = "error: predict.smoothing: is for a video; images are labelled each for itself, leave it out\n"
        assert capsys.readouterr().err == text and not (tmp_path / "o").exists()
    assert program.main(words) == program.main([*words, "predict.smoothing=null", "predict.overlap=0.5"]) == 0
