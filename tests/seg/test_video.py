"""A video labelled from end to end with a stand-in for the network, whose labels are known."""

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.video import Reader, writing
from seg import labels, video
from seg.averaging import Views, predictor_of
from seg.labels import TRAIN_COLORS, TRAIN_LABEL_IDS, to_label_ids
from seg.models import from_checkpoint
from seg.video import label_video
from tools import predict as program

QUIET = {"say": lambda _: None}


def bright(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Train id 13 (car) where a frame is bright, 0 (road) elsewhere."""
    return [np.where(frame[..., 1] > 127, 13, 0).astype(np.uint8) for frame in frames]


def shares(frames: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The same as probabilities: 0.6 for the one, 0.4 for the other."""
    found = []
    for ids in bright(frames):
        share = torch.zeros(19, *ids.shape)
        car = torch.from_numpy(ids == 13)
        share[13] = torch.where(car, 0.6, 0.4)
        share[0] = torch.where(car, 0.4, 0.6)
        found.append(share)
    return found


def picture(left: int, width: int = 64, height: int = 48) -> np.ndarray:
    frame = np.full((height, width, 3), 20, np.uint8)
    frame[8:40, left : left + 16] = 230
    return frame


def drive(path: Path, frames: Sequence[np.ndarray], rate: float = 12.5) -> Path:
    with writing(path, rate, (frames[0].shape[1] // 2 * 2, frames[0].shape[0] // 2 * 2)) as append:
        for frame in frames:
            append(frame)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return drive(tmp_path / "drive.avi", [picture(4 * i) for i in range(9)])


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_every_frame_is_labelled_and_written_in_order(tmp_path: Path, source: Path, batch_size: int):
    sizes = []

    def predict(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        sizes.append(len(frames))
        return bright(frames)

    out = tmp_path / "ids.mkv"
    summary = label_video(predict, source, out, ["labels"], batch_size=batch_size, **QUIET)
    with Reader(source) as frames, Reader(out) as written:
        assert (written.rate, written.size) == (12.5, (64, 48))
        for image, found in zip(frames, written, strict=True):
            ids = np.where(bright([image])[0] == 13, TRAIN_LABEL_IDS[13], TRAIN_LABEL_IDS[0])
            assert np.array_equal(found[..., 0], ids)
    assert sizes == {1: [1] * 9, 4: [4, 4, 1], 20: [9]}[batch_size]
    assert (summary.speed.frames, summary.files, summary.problems) == (9, [out], [])
    assert str(summary).splitlines()[0] == f"{source}: 9 frames of 64 x 48 at 12.5 frames/s labelled -> {out}"
    assert "frames/s end to end; by the time" in str(summary)


def test_overlay_and_colours_each_get_a_file(tmp_path: Path, source: Path):
    out = tmp_path / "drive_seg.mp4"
    summary = label_video(bright, source, out, ["overlay", "color"], **QUIET)
    assert [path.name for path in summary.files] == ["drive_seg_overlay.mp4", "drive_seg_color.mp4"]
    with Reader(source) as frames, Reader(summary.files[0]) as overlay, Reader(summary.files[1]) as color:
        for image, mixed, painted in zip(frames, overlay, color, strict=True):
            expected = TRAIN_COLORS[bright([image])[0]]
            assert np.abs(painted.astype(int) - expected).mean() < 12
            assert np.abs(mixed.astype(int) - (image.astype(int) + expected) / 2).mean() < 12
    assert not list(tmp_path.glob(".*"))


def test_another_table_gives_its_colours_and_ids(tmp_path: Path, source: Path):
    """A network of two classes with a table of its own."""
    first, second = labels.CITYSCAPES.labels[7], labels.CITYSCAPES.labels[26]
    table = type(labels.CITYSCAPES)(
        "two",
        (
            type(first)(3, "ground", (1, 2, 3), 0, "flat", False),
            type(second)(9, "thing", (200, 100, 0), 1, "object", False),
        ),
    )
    summary = label_video(
        lambda frames: [(ids > 0).astype(np.uint8) for ids in bright(frames)],
        source,
        tmp_path / "x.mkv",
        ["labels", "color"],
        table=table,
        **QUIET,
    )
    with Reader(summary.files[0]) as ids, Reader(summary.files[1]) as color:
        assert set(np.unique(next(iter(ids)))) == {3, 9}
        assert np.abs(next(iter(color))[20, 8].astype(int) - (200, 100, 0)).max() < 20


def test_reading_and_writing_go_on_beside_the_network_and_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = drive(tmp_path / "long.avi", [picture(i % 40) for i in range(60)])
    made, written, most, threads = [0], [0], [0], set()
    real = Reader._next

    def read(self: Reader) -> np.ndarray | None:
        made[0] += 1
        threads.add(threading.current_thread().name)
        return real(self)

    def painted(kind: str, image: np.ndarray, ids: np.ndarray, table: labels.LabelTable) -> np.ndarray:
        written[0] += 1
        threads.add(threading.current_thread().name)
        return image

    def predict(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        most[0] = max(most[0], made[0] - written[0])
        return bright(frames)

    monkeypatch.setattr(Reader, "_next", read)
    monkeypatch.setattr(video, "_painted", painted)
    label_video(predict, source, tmp_path / "o.avi", ["color"], batch_size=2, **QUIET)
    assert written[0] == 60 and {"ahead", "behind"} <= threads
    assert most[0] <= 2 * 4 + 3 * 2 + 4, "frames in memory, whatever the length"


def test_smoothing_takes_away_flicker_and_tells_how_much(tmp_path: Path):
    """A still image whose stand-in network changes its mind in a square in every third frame."""
    frames = [picture(8)] * 12
    source = drive(tmp_path / "still.avi", frames)
    count = [0]

    def flickering(batch: Sequence[np.ndarray]) -> list[torch.Tensor]:
        found = shares(batch)
        for share in found:
            count[0] += 1
            if count[0] % 3 == 0:
                share[:, 0:6, 0:8] = 0
                share[5, 0:6, 0:8], share[0, 0:6, 0:8] = 0.6, 0.4
        return found

    plain = label_video(
        bright, source, tmp_path / "a.mkv", ["labels"], smoothing=1.0, probabilities=flickering, **QUIET
    )
    assert plain.smoothed is not None
    pairs_with_a_change = 7  # of 11: to and from frames 3, 6 and 9, and to frame 12
    share = pairs_with_a_change * 48 / (11 * 64 * 48)
    assert plain.flicker.share == plain.smoothed.share == share
    count[0] = 0
    smooth = label_video(
        bright, source, tmp_path / "b.mkv", ["labels"], smoothing=0.2, probabilities=flickering, batch_size=5, **QUIET
    )
    assert smooth.flicker.share == share
    assert smooth.smoothed is not None and smooth.smoothed.share == smooth.smoothed.still_share == 0
    assert "flicker (pixels that change class from a frame to the next): 0.99% (" in str(smooth)
    assert "; after smoothing 0.00% (0.00% where" in str(smooth)


def test_smoothing_is_the_exponential_average(tmp_path: Path):
    frames = [picture(4 * i) for i in range(7)]
    work = video._Labeller(bright, 0.3, shares)
    found = [*work(frames[:3]), *work(frames[3:])]
    average = None
    for frame, ids in zip(frames, found, strict=True):
        share = shares([frame])[0].double()
        average = share if average is None else 0.3 * share + 0.7 * average
        assert np.array_equal(ids, average.argmax(0).numpy())


def test_a_scene_cut_starts_the_average_anew(tmp_path: Path):
    before, after = np.full((48, 64, 3), 10, np.uint8), np.full((48, 64, 3), 240, np.uint8)
    work = video._Labeller(bright, 0.1, shares)
    found = list(work([before, before, after, after]))
    assert [int(ids[0, 0]) for ids in found] == [0, 0, 13, 13]
    assert work.motion.cuts == 1 and work.flicker.share == 0


@pytest.mark.parametrize("smoothing", [None, 0.4])
def test_nothing_but_scene_cuts_is_said_in_place_of_the_flicker(tmp_path: Path, smoothing: float | None):
    dark, light = np.full((48, 64, 3), 10, np.uint8), np.full((48, 64, 3), 240, np.uint8)
    path = drive(tmp_path / "cuts.avi", [dark, light, dark, light])
    more = {"smoothing": smoothing, "probabilities": shares, **QUIET}
    text = str(label_video(bright, path, tmp_path / "out.avi", **more))
    path = drive(tmp_path / "cut.avi", [dark, light])
    assert text.splitlines()[-1] == "flicker: no two neighbouring frames of one scene; 3 scene cuts"
    assert "of one scene; 1 scene cut" in str(label_video(bright, path, tmp_path / "out.avi", **more)).splitlines()[-1]


def test_odd_sides_lose_a_pixel_and_it_is_said(tmp_path: Path):
    path = tmp_path / "odd.mkv"
    frame = np.random.default_rng(0).integers(0, 256, (47, 63, 3), np.uint8)

    class Odd(Reader):
        def _next(self) -> np.ndarray | None:
            found = super()._next()
            return None if found is None else found[:47, :63]

    drive(path, [np.pad(frame, ((0, 1), (0, 1), (0, 0)))] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "Reader", Odd)
        summary = label_video(bright, path, tmp_path / "out.mkv", ["labels"], **QUIET)
    assert summary.size == (62, 46) and not summary.problems
    assert "remark: odd sides (63 x 47) lose their last pixel" in str(summary)


def test_a_truncated_video_is_labelled_as_far_as_it_goes(tmp_path: Path):
    rng = np.random.default_rng(0)
    path = drive(tmp_path / "a.avi", [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(20)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    summary = label_video(bright, path, tmp_path / "out.mp4", **QUIET)
    count = summary.speed.frames
    with Reader(tmp_path / "out.mp4") as reader:
        assert len(list(reader)) == count > 4
    assert f"problem: {count} frames could be read of the 20 announced" in str(summary)


def test_a_single_frame_has_no_flicker(tmp_path: Path):
    summary = label_video(bright, drive(tmp_path / "one.mp4", [picture(3)]), tmp_path / "out.mp4", **QUIET)
    assert math.isnan(summary.flicker.share) and "flicker" not in str(summary)
    assert "1 frame of 64 x 48" in str(summary)


@pytest.mark.parametrize(
    "out, save, text",
    [
        ("drive.avi", ["overlay"], "drive.avi: is the video that is read; choose another name"),
        ("out", ["overlay"], "found no ending, expected a video's"),
        ("out.mp4", ["labels"], "label ids need a lossless file, found the ending .mp4"),
        ("out.mp4", ["pictures"], "Cannot save pictures of a video; choose from labels, color, overlay."),
        ("out.mkv", ["labels", "confidence"], "Cannot save confidence of a video, only of images, such as its frames;"),
        ("", ["overlay"], "is a folder; a video needs the name of a file, such as drive_seg.mp4"),
        ("drive.avi/x.mp4", ["overlay"], "cannot write there"),
    ],
)
def test_mistakes_are_told_before_a_frame_is_labelled(
    tmp_path: Path, source: Path, out: str, save: list[str], text: str
):
    def never(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise AssertionError

    with pytest.raises(UserError) as error:
        label_video(never, source, tmp_path / out, save, **QUIET)
    assert text in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["drive.avi"]


def test_an_error_of_the_network_leaves_nothing(tmp_path: Path, source: Path):
    def fails(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise UserError("The network's output is not finite")

    with pytest.raises(UserError, match="not finite"):
        label_video(fails, source, tmp_path / "out.mp4", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["drive.avi"]
    assert not [one for one in threading.enumerate() if one.name in ("ahead", "behind")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """Of a tiny training."""
    from engine.config import load
    from seg import train
    from seg.config import SegConfig

    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(
        "task: seg\nlength: 1 step\nbatch_size: 2\ndata: {crop: [64, 64]}\n"
        "model: {name: lraspp_mobilenet_v3_large, output_stride: 16}\nruntime: {workers: 0, device: cpu}\n"
        "report: {tensorboard: false, images: 0}\n"
    )
    train.run(load(folder / "tiny.yaml", [f"data.root={sample_root}"], SegConfig), folder / "work")
    return folder / "work" / "last.pt"


def predict(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What the program prints."""
    capsys.readouterr()
    assert program.main([*map(str, arguments)]) == status
    return "".join(capsys.readouterr())


def test_the_program_labels_a_video_as_it_labels_its_frames(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(0)
    noise = cv2.resize(rng.integers(0, 230, (6, 8, 3), np.uint8), (64, 48))
    frames = [noise + np.uint8(5 * number) for number in range(4)]
    with writing(tmp_path / "grey.mkv", 30, (64, 48), lossless=True) as append:
        for number, frame in enumerate(frames):
            append(frame[..., 0])
            cv2.imwrite(str(tmp_path / f"{number}.png"), frame[..., 0])
    out = predict(
        capsys, checkpoint, tmp_path / "grey.mkv", "--out", tmp_path / "ids.mkv", "--save", "labels", "--smooth", "1"
    )
    assert "4 frames of 64 x 48 at 30 frames/s labelled" in out and "after smoothing" in out
    predict(capsys, checkpoint, *sorted(tmp_path.glob("?.png")), "--out", tmp_path / "images")
    with Reader(tmp_path / "ids.mkv") as reader:
        for number, found in enumerate(reader):
            ids = cv2.imread(str(tmp_path / f"images/labels/{number}_labelIds.png"), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(found[..., 0], ids)


def test_the_program_averages_over_views_of_each_frame(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    source = drive(tmp_path / "in.avi", [picture(number) for number in range(3)])
    with Reader(source) as reader:
        frames = list(reader)
    model, cfg, _ = from_checkpoint(checkpoint, ["runtime.device=cpu"])
    expected = predictor_of(model, cfg, "cpu", Views((0.5, 1.0), flip=True)).predict_batch(frames)
    for more in ([], ["--smooth", "1"]):  # the newest frame alone
        arguments = [checkpoint, source, "--out", tmp_path / "ids.mkv", "--save", "labels", "data.eval_batch_size=2"]
        predict(capsys, *arguments, "--scales", "0.5", "1", "--flip", *more)
        with Reader(tmp_path / "ids.mkv") as reader:
            for found, ids in zip(reader, expected, strict=True):
                assert np.array_equal(found[..., 0], to_label_ids(ids))


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["half.mp4", "--out", "x.mp4"], 2, "error: half.mp4: cannot be opened as a video"),
        (["a.mp4", "b.png", "--out", "x.mp4"], 2, "a.mp4: a video goes alone; found 2 inputs"),
        (["b.png", "--out", "x", "--smooth", "0.5"], 2, "--smooth: is for a video"),
        (["a.mp4", "--out", "x.mp4", "--smooth", "1.5"], 2, "predict.smoothing"),
    ],
)
def test_mistakes_with_a_video_are_one_line(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    text: str,
):
    monkeypatch.chdir(tmp_path)
    whole = drive(Path("a.mp4"), [picture(3)] * 3).read_bytes()
    Path("half.mp4").write_bytes(whole[: len(whole) // 2])
    printed = predict(capsys, checkpoint, *arguments, status=status)
    assert text in printed and len(printed.splitlines()) == 1
