"""Video files there and back: size, rate, content; files that are none, or not whole."""

import os
import re
import resource
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine import video
from engine.errors import UserError
from engine.video import CODECS, LOSSLESS, Reader, writing


def frames(count: int = 6, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Each of one colour, with a white square that moves."""
    found = []
    for number in range(count):
        frame = np.full((height, width, 3), (40 * number % 256, 60, 200), np.uint8)
        frame[8:24, 4 * number : 4 * number + 16] = 255
        found.append(frame)
    return found


def write(path: Path, content: list[np.ndarray], rate: float = 12.5) -> Path:
    with writing(path, rate, content[0].shape[1::-1]) as append:
        for frame in content:
            append(frame)
    return path


@pytest.mark.parametrize("ending", sorted(CODECS))
def test_every_ending_keeps_frames_rate_and_size(tmp_path: Path, ending: str):
    path = write(tmp_path / f"a{ending}", frames())
    with Reader(path) as reader:
        found = list(reader)
    assert (reader.rate, reader.size, reader.announced, reader.read) == (12.5, (64, 48), 6, 6)
    assert not reader.problems and not reader.remarks
    for one, other in zip(found, frames(), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 12, "RGB, in order"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", sorted(LOSSLESS))
def test_ids_come_back_exactly(tmp_path: Path, ending: str):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, (48, 64), dtype=np.uint8) for _ in range(3)]
    with writing(tmp_path / f"a{ending}", 30, (64, 48), lossless=True) as append:
        for one in ids:
            append(one)
    with Reader(tmp_path / f"a{ending}") as reader:
        for one, other in zip(reader, ids, strict=True):
            assert all(np.array_equal(one[..., channel], other) for channel in range(3))


def test_a_truncated_file_gives_what_it_has_and_says_so(tmp_path: Path):
    path = write(
        tmp_path / "a.avi", [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(20)]
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with Reader(path) as reader:
        count = len(list(reader))
    assert 5 <= count < 15
    assert reader.problems == [f"{count} frames could be read of the 20 announced; the file is cut off or damaged"]


def lasting(path: Path, seconds: float) -> None:
    """Makes an .mkv say that its longest stream lasts so long."""
    data = bytearray(path.read_bytes())
    place = data.find(b"\x44\x89\x88") + 3  # Matroska's Duration, a double: the length of all streams, in milliseconds
    data[place : place + 8] = struct.pack(">d", 1000 * seconds)
    path.write_bytes(data)


def test_a_file_whose_sound_is_longer_than_its_pictures_is_not_called_damaged(tmp_path: Path):
    path = write(tmp_path / "a.mkv", [np.full((48, 64, 3), 9 * i, np.uint8) for i in range(20)])
    lasting(path, 2 * 20 / 12.5)
    with Reader(path) as reader:
        assert len(list(reader)) == 20
    said = r"20 frames .* the 40 that its length .* sound is longer .* or the file is cut off"
    assert re.match(said, reader.problems[0])


def test_sound_that_ends_a_little_after_the_pictures_is_usual(tmp_path: Path):
    path = write(tmp_path / "a.mkv", [np.full((48, 64, 3), 2 * i, np.uint8) for i in range(100)], 60)
    lasting(path, 100 / 60 + 0.06)
    with Reader(path) as reader:
        assert len(list(reader)) == 100
    assert reader.announced > 102 and not reader.problems


def edited(path: Path, seconds: float, start: int) -> None:
    """Makes an .mp4 of ours show so many seconds from frame `start` on, as cutting without encoding does."""
    data = bytearray(path.read_bytes())
    place = data.find(b"elst") + 12  # behind the name, the version and the number of entries
    assert struct.unpack(">I", data[place - 4 : place]) == (1,)
    units = struct.unpack(">I", data[data.find(b"mdhd") + 16 :][:4])[0]
    data[place : place + 8] = struct.pack(">II", round(1000 * seconds), round(units * start / 12.5))
    path.write_bytes(data)


def test_frames_that_an_edit_list_leaves_out_are_not_missing(tmp_path: Path):
    path = write(tmp_path / "a.mp4", [np.full((48, 64, 3), 4 * i, np.uint8) for i in range(50)])
    assert video.shown_share(path) == 1
    edited(path, 20 / 12.5, 25)
    with Reader(path) as reader:
        found = [frame.mean() for frame in reader]
    assert len(found) == 20 and abs(found[0] - 100) < 4 and not reader.problems
    assert reader.remarks == [
        "20 frames could be read of the 50 in the file, whose edit list leaves out the others: it was trimmed"
    ]
    data = bytearray(path.read_bytes())
    places = [m.start() for m in re.finditer(b"\x00\x00\x01\xb6", data)]  # a picture of MPEG-4
    assert len(places) == 50
    data[places[36] : places[48]] = bytes(places[48] - places[36])
    path.write_bytes(data)
    with Reader(path) as reader:
        count = len(list(reader))
    assert count < 18 and not reader.remarks and "the file is cut off or damaged" in reader.problems[0]


@pytest.mark.parametrize("damage", ["moov", "mvhd", "mdhd", "elst", "hdlr", "trak"])
def test_a_damaged_edit_list_is_none(tmp_path: Path, damage: str):
    path = write(tmp_path / "a.mp4", frames())
    edited(path, 0.2, 1)
    assert abs(video.shown_share(path) - 0.2 / (6 / 12.5)) < 1e-3
    data = bytearray(path.read_bytes())
    place = data.find(damage.encode()) + 4
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert 0 <= video.shown_share(path) <= 1
    path.write_bytes(data[: place + 20])
    assert video.shown_share(path) == 1
    assert video.shown_share(write(tmp_path / "a.avi", frames())) == 1


def timed(path: Path, lengths: list[int]) -> None:
    """Makes the frames of an .mp4 of ours last as many times their usual length."""
    data = bytearray(path.read_bytes())
    place = data.find(b"stts") - 4
    size, entries, _, usual = struct.unpack(">I8xIII", data[place : place + 24])
    assert entries == 1
    table = b"".join(struct.pack(">II", 1, usual * length) for length in lengths)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        box = data.find(name) - 4
        data[box : box + 4] = struct.pack(">I", struct.unpack(">I", data[box : box + 4])[0] + len(table) + 16 - size)
    length = data.find(b"mdhd") + 20
    data[length : length + 4] = struct.pack(">I", usual * sum(lengths))
    data[data.find(b"edts") : data.find(b"edts") + 4] = b"free"
    data[place : place + size] = struct.pack(">I4sII", len(table) + 16, b"stts", 0, len(lengths)) + table
    path.write_bytes(data)


@pytest.mark.parametrize("ending", sorted(CODECS))
@pytest.mark.parametrize("rate", [29.97002997, 120.4567, 239.4327, 733.3333])
def test_an_odd_rate_is_kept_nearly(tmp_path: Path, ending: str, rate: float):
    with Reader(write(tmp_path / f"x{ending}", frames(3), rate)) as reader:
        assert reader.rate == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("lengths, uneven", [([1] * 40, False), ([1] * 20 + [4] * 20, True), ([2, 4] * 20, False)])
def test_a_rate_that_varies_is_said(tmp_path: Path, lengths: list[int], uneven: bool):
    path = write(tmp_path / "a.mp4", [np.full((48, 64, 3), 6 * i, np.uint8) for i in range(40)], 60)
    timed(path, lengths)
    with Reader(path) as reader:
        assert len(list(reader)) == 40
    assert reader.rate == pytest.approx(60 * 40 / sum(lengths)) and not reader.problems
    said = "frames come up to 0.5 s earlier or later than at the constant 24 a second that are taken: its rate varies"
    assert reader.remarks == [said] * uneven


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "b.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no video" * 1000)
    elif kind == "index cut off":
        path.write_bytes(write(tmp_path / "a.mp4", frames()).read_bytes()[:-400])
    elif kind == "no frames":
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
        writer.release()
    elif kind == "unknown codec":
        data = write(tmp_path / "a.avi", frames()).read_bytes()
        path.write_bytes(data.replace(b"MJPG", b"zzzz"))
    return path


@pytest.mark.parametrize(
    "kind, text",
    [
        ("missing", "b.mp4: no such file"),
        ("empty", "b.mp4: the file is empty (0 bytes)"),
        ("text", "b.mp4: cannot be opened as a video"),
        ("index cut off", "b.mp4: cannot be opened as a video: not a video file, cut off"),
        ("no frames", "b.mp4: "),
        ("unknown codec", "or of a codec that OpenCV's FFmpeg does not know"),
    ],
)
def test_a_file_without_frames_is_one_error(tmp_path: Path, kind: str, text: str):
    with pytest.raises(UserError) as error:
        Reader(broken(tmp_path, kind))
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["2024-05-01T12:30:00.mp4", "12:30/a.mp4", "file:a.mp4", "a%03d.mp4"])
def test_names_that_look_like_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    with Reader(write(Path(name), frames())) as reader:
        assert len(list(reader)) == 6


def test_names_that_are_no_text(tmp_path: Path):
    good, place = write(tmp_path / "a.mp4", frames()), Path(os.fsdecode(bytes(tmp_path) + b"/b\xfc"))
    place.mkdir()
    with pytest.raises(UserError, match=r"b\\udcfc.mp4: OpenCV opens no video whose name, .* is not UTF-8; rename it"):
        Reader(good.rename(f"{place}.mp4"))
    with pytest.raises(UserError, match=r"b\\udcfc/a.mp4: OpenCV opens no video"):
        write(place / "a.mp4", frames())
    assert not list(place.iterdir())
    write(place.with_name(f"{place.name}2.mp4"), frames())  # only its temporary name is told to OpenCV


def test_frames_that_change_their_size_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Reader(write(tmp_path / "a.mp4", frames())) as reader:
        monkeypatch.setattr(reader, "_next", lambda: np.zeros((24, 32, 3), np.uint8))
        with pytest.raises(UserError, match="frame 2 has 32 x 24 pixels, those before 64 x 48"):
            list(reader)


def test_no_rate_in_the_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.mp4", frames())
    real = cv2.VideoCapture

    class Without:
        def __init__(self, *arguments: object) -> None:
            self.capture = real(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(self.capture, name)

        def get(self, key: int) -> float:
            return 0.0 if key == cv2.CAP_PROP_FPS else self.capture.get(key)

    monkeypatch.setattr(cv2, "VideoCapture", Without)
    with Reader(path) as reader:
        assert reader.rate == 25
    assert reader.remarks == ["the file tells no frame rate (found 0); 25 is assumed"]


@pytest.mark.parametrize(
    "name, lossless, text",
    [
        ("a", False, "found no ending, expected a video's: .mp4"),
        ("a.gif", False, "found the ending .gif, expected a video's: .mp4"),
        ("a.mp4", True, "label ids need a lossless file, found the ending .mp4, expected a video's: .mkv, .avi"),
    ],
)
def test_an_output_of_no_known_ending(tmp_path: Path, name: str, lossless: bool, text: str):
    with pytest.raises(UserError) as error, writing(tmp_path / name, 10, (64, 48), lossless):
        pass
    assert text in str(error.value)


def test_an_output_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot write there"), writing(tmp_path / "file/a.mp4", 10, (64, 48)):
        pass


def test_a_size_that_the_codec_refuses(tmp_path: Path):
    with pytest.raises(UserError, match="OpenCV cannot write this video"), writing(tmp_path / "a.mp4", 10, (0, 0)):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = write(tmp_path / "a.mp4", frames())
    before = path.read_bytes()
    with pytest.raises(KeyError), writing(path, 10, (64, 48)) as append:
        append(frames()[0])
        raise KeyError
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_error(tmp_path: Path):
    """OpenCV tells nothing when a write fails; here files may not grow beyond 20 kB."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(UserError, match="a.avi: not all of its 60 frames could be written"):
            write(tmp_path / "a.avi", [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(60)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())
