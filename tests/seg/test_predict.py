"""Predictor: no pixel lost or shifted, whatever the size, window, stride and batch; memory bounded; clear errors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from engine import checkpoint
from engine.errors import UserError
from seg import predict
from seg.config import SegConfig
from seg.predict import Predictor
from tests.seg.echo import CLASSES, ONE, ZERO, Echo, echo, picture

SIZES = [(1, 1), (1, 40), (2, 3), (31, 33), (32, 64), (65, 97), (128, 100)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", [1, 8, 32, 37])
def test_whole_images_come_back_pixel_by_pixel(size: tuple[int, int], multiple: int) -> None:
    image = picture(*size)
    predictor = echo(multiple)
    ids = predictor.predict(image)
    assert ids.dtype == np.uint8 and np.array_equal(ids, image[..., 0])
    assert min(predictor.model.sizes[0][-2:]) >= 32


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (65, 97), (128, 100)])
@pytest.mark.parametrize("window", [(32, 32), (33, 48), (200, 40)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("batch", [1, 5])
def test_windows_lose_and_shift_nothing(
    size: tuple[int, int], window: tuple[int, int], overlap: float, batch: int
) -> None:
    image = picture(*size)
    predictor = echo(8, window=window, overlap=overlap, batch_size=batch)
    assert np.array_equal(predictor.predict(image), image[..., 0])
    assert all(shape[0] <= batch for shape in predictor.model.sizes)
    largest = [max(32, -(-side // 8) * 8) for side in window]
    assert all(shape[2] <= largest[0] and shape[3] <= largest[1] for shape in predictor.model.sizes)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("length", [100, 101, 1025, 4000])
def test_cuts_tile_the_side_and_overlap_as_asked(length: int, overlap: float) -> None:
    cuts = predict._cuts(length, 96, overlap)
    kept = [i for _, part in cuts for i in range(part.start, part.stop)]
    assert kept == list(range(length))
    for (left, left_kept), (right, right_kept) in zip(cuts, cuts[1:], strict=False):
        common = left.stop - right.start
        assert common >= int(96 * overlap)
        # what is cut away at the seam is shared fairly: the border of a window is its worst place
        assert abs((left.stop - left_kept.stop) - (right_kept.start - right.start)) <= 1


def test_a_batch_of_unlike_images_keeps_their_order() -> None:
    images = [picture(40, 50, 1), picture(40, 50, 2), picture(33, 70, 3), picture(40, 50, 4)]
    predictor = echo(8, batch_size=2)
    for image, ids in zip(images, predictor.predict_batch(images), strict=True):
        assert np.array_equal(ids, image[..., 0])
    assert [shape[0] for shape in predictor.model.sizes] == [2, 1, 1]
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize(
    "options", [{}, {"window": (32, 40)}, {"base_size": 30}, {"window": (20, 32), "base_size": 90}]
)
def test_confidence_is_the_probability_of_the_class(options: dict[str, Any]) -> None:
    image = picture(60, 80)
    predictor = echo(8, **options)
    ids, confidence = predictor.predict_confident(image)
    shares = predictor.probabilities(image).numpy()
    assert ids.dtype == confidence.dtype == np.uint8
    assert np.array_equal(ids, predictor.predict(image)) and np.array_equal(ids, shares.argmax(0))
    assert np.abs(confidence - 255 * shares.max(0)).max() <= 0.5001


def test_probabilities_in_255ths() -> None:
    found = predict.in_255ths(torch.tensor([[0.0, 0.001, 0.002, 0.5, 0.9979, 0.9981, 1.0]]))
    assert found.tolist() == [[0, 0, 1, 128, 254, 255, 255]]


def test_large_images_go_in_windows_and_whole_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "WHOLE_LIMIT", 64 * 64)
    monkeypatch.setattr(predict, "LARGE_WINDOW", (32, 64))
    small, large = picture(64, 64), picture(65, 64)
    predictor = echo()
    assert np.array_equal(predictor.predict(small), small[..., 0])
    assert predictor.model.sizes == [(1, 3, 64, 64)]
    assert np.array_equal(predictor.predict(large), large[..., 0])
    assert set(predictor.model.sizes[1:]) == {(1, 3, 32, 64)}


def test_dict_outputs_and_normalisation() -> None:
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            seen.append(images)
            return {"aux": torch.zeros(1), "out": torch.cat([images, -images], 1)}

    image = np.full((32, 32, 3), 255, np.uint8)
    image[..., 1] = 0
    probabilities = Predictor(Net().eval(), (0.5, 0.25, 0.0), (0.5, 0.5, 0.25)).probabilities(image)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, -0.5, 4.0]))
    assert probabilities.shape == (6, 32, 32) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities[:, 3, 5], torch.tensor([1.0, -0.5, 4, -1, 0.5, -4]).softmax(0))


def test_coarse_logits_are_enlarged_as_torch_does_it() -> None:
    class Coarse(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.avg_pool2d(images, 8)

    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    expected = F.interpolate(F.avg_pool2d(pixels, 8), (64, 96), mode="bilinear", align_corners=False)
    predictor = Predictor(Coarse().eval(), ZERO, ONE)
    torch.testing.assert_close(predictor.probabilities(image), expected[0].softmax(0))
    assert np.array_equal(predictor.predict(image), expected[0].argmax(0).numpy())


@pytest.mark.parametrize("size", [(50, 90), (7, 9), (200, 31)])
def test_base_size_predicts_at_that_side_and_answers_at_the_images_own(size: tuple[int, int]) -> None:
    """The ids are those of one bilinear enlargement, in strips or not, in windows or not."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([rows * 255 / size[0], columns * 255 / size[1], 128 + 0 * rows], -1).astype(np.uint8)

    class Same(nn.Module):
        shapes: list[tuple[int, ...]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.shapes.append(tuple(images.shape[-2:]))
            return images

    options: dict[str, Any] = {"base_size": 64, "multiple": 1}
    predictor = Predictor(Same().eval(), ZERO, ONE, **options)
    scaled = torch.from_numpy(predictor._input(image)).permute(2, 0, 1)[None].float() / 255
    assert min(scaled.shape[-2:]) == 64
    expected = F.interpolate(scaled, size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(predictor.probabilities(image), expected.softmax(0))
    ids = predictor.predict(image)
    assert ids.shape == size and (ids == expected.argmax(0).numpy()).mean() > 0.999
    windowed = Predictor(Same().eval(), ZERO, ONE, window=(40, 40), **options)
    assert np.array_equal(windowed.predict(image), ids)


@pytest.mark.parametrize("side", [24, 36, 48, 64, 96])
def test_images_of_a_program_enter_as_files_do(side: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    want = predict.scaled(image, side / 48)
    found = predict.at_shorter_side(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, side)
    difference = np.abs((found[0].permute(1, 2, 0) * 255).numpy() - want)
    assert found.shape == (1, 3, *want.shape[:2])
    assert difference.max() < 1.01 and (difference > 0.01).mean() < 0.15  # OpenCV rounds twice, so that halves differ
    assert side not in (24, 48) or difference.max() < 0.01


def test_enlarging_in_strips_equals_enlarging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 13, 17)
    expected = F.interpolate(logits[None], (101, 64), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(predict, "_STRIP_VALUES", 5 * 64 * 7)
    strips = list(predict._enlarged(logits, (101, 64)))
    assert len(strips) == 15
    torch.testing.assert_close(torch.cat([strip for _, strip in strips], 1), expected)


@pytest.mark.parametrize("size", [(50, 17), (101, 64)])
def test_probabilities_take_the_place_of_logits_of_their_size(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(predict, "_STRIP_VALUES", 5 * 17 * 7)
    logits = torch.randn(5, 50, 17)
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0)
    found = predict._softmax(logits, size)
    assert (found.data_ptr() == logits.data_ptr()) == (size == (50, 17))  # of 124 classes two copies are too many
    torch.testing.assert_close(found, expected)


def test_a_real_network_takes_one_pixel_and_odd_sizes() -> None:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    predictor = Predictor.from_config(model, SegConfig.model_validate(CONFIG))
    for size in [(1, 1), (5, 300), (67, 45)]:
        assert predictor.predict(picture(*size)).shape == size


def test_evaluation_size_images_are_not_touched() -> None:
    """Sides that the stride divides are not padded, so that the network sees what evaluation shows it."""
    predictor = Predictor(Echo().eval(), ZERO, ONE, multiple=8)
    predictor.predict(picture(40, 72))
    assert predictor.model.sizes == [(1, 3, 40, 72)]  # type: ignore[comparison-overlap]


CONFIG: dict[str, Any] = {
    "task": "seg",
    "length": "1 epochs",
    "batch_size": 1,
    "data": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0], "eval_batch_size": 3},
    "predict": {"window": [48, 64], "overlap": 0.5},
}


def test_from_config_takes_what_the_config_says() -> None:
    predictor = Predictor.from_config(Echo().eval(), SegConfig.model_validate(CONFIG))
    assert predictor.mean == (0.5, 0.5, 0.5) and predictor.std == (0.25, 0.5, 1.0)
    assert (predictor.window, predictor.overlap, predictor.batch_size) == ((48, 64), 0.5, 3)
    assert (predictor.multiple, predictor.base_size) == (8, None)


def test_bfloat16_answers_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, CLASSES, 1)).eval()
    image = picture(32, 32)
    full = Predictor(model, ZERO, ONE).probabilities(image)
    half = Predictor(model, ZERO, ONE, amp=torch.bfloat16).probabilities(image)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, atol=0.02, rtol=0)


def test_nothing_remembers_gradients() -> None:
    model = nn.Conv2d(3, CLASSES, 1).eval()
    assert not Predictor(model, ZERO, ONE).probabilities(picture(32, 32)).requires_grad


def test_errors() -> None:
    good = Echo().eval()
    with pytest.raises(ValueError, match="training mode"):
        Predictor(Echo(), ZERO, ONE)
    with pytest.raises(ValueError, match="0 <= overlap < 1"):
        Predictor(good, ZERO, ONE, overlap=1.0)
    for bad in [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ]:
        with pytest.raises(ValueError, match=r"expected an image uint8 \(H, W, 3\)"):
            Predictor(good, ZERO, ONE).predict(bad)
    with pytest.raises(UserError, match="An image of 300000 x 1 pixels is too long"):
        Predictor(good, ZERO, ONE, base_size=512).predict(np.zeros((1, 300000, 3), np.uint8))


def test_nan_is_an_error_not_class_0() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.log() * 0  # log of 0 is -inf, times 0 is nan

    with pytest.raises(UserError, match="not finite"):
        Predictor(Broken().eval(), ZERO, ONE).predict(np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_what_to_set(error: Exception) -> None:
    with pytest.raises(UserError, match="1 x 32 x 48 pixels at once; set a smaller predict.window"):
        Predictor(failing(error), ZERO, ONE).predict(picture(32, 48))


def test_other_errors_of_the_network_pass_through() -> None:
    with pytest.raises(RuntimeError, match="sizes differ"):
        Predictor(failing(RuntimeError("sizes differ")), ZERO, ONE).predict(picture(32, 48))


def failing(error: Exception) -> nn.Module:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise error

    return Failing().eval()


# tools/predict.py

TOOL = Path(__file__).parents[2] / "tools/predict.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool's module, with a checkpoint loader that gives `Echo` and notes what it was asked for."""
    spec = importlib.util.spec_from_file_location("predict_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    loader: Any = ModuleType("seg.models")
    loader.asked = []

    def from_checkpoint(path: Path, overrides: list[str], allow_imports: bool = False, folded: bool = False) -> Any:
        assert folded
        loader.asked.append((path, overrides))
        if path.name == "broken.pt":
            raise UserError(f"{path}: not a checkpoint.")
        plain = {**CONFIG, "data": {"mean": ZERO, "std": ONE}, "runtime": {"device": "cpu"}}
        return Echo(as_dict=True).eval(), SegConfig.model_validate(plain), {}

    loader.from_checkpoint = from_checkpoint
    monkeypatch.setitem(sys.modules, "seg.models", loader)
    monkeypatch.setattr(checkpoint, "task", lambda path: "seg")
    module.asked = loader.asked
    return module


def test_tool_labels_files(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(40, 70)
    for name in ("a.png", "b=c.png"):
        Image.fromarray(image).save(tmp_path / name)
    out = tmp_path / "out"
    words = [
        "x/best.pt",
        tmp_path / "a.png",
        "--out",
        out,
        tmp_path / "b=c.png",
        "predict.overlap=0.5",
        "--device",
        "cpu",
    ]
    assert tool.main([*map(str, words), "--save", "labels", "color", "data.root=/d"]) == 0
    assert tool.asked == [(Path("x/best.pt"), ["predict.overlap=0.5", "data.root=/d", "runtime.device=cpu"])]
    assert capsys.readouterr().out.splitlines()[-1] == "2 images labelled"
    from seg.labels import to_label_ids

    for stem in ("a", "b=c"):
        assert np.array_equal(np.asarray(Image.open(out / f"labels/{stem}_labelIds.png")), to_label_ids(image[..., 0]))
        assert (out / f"color/{stem}_color.png").is_file()
    assert not (out / "overlay").exists()


def test_tool_exit_status(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(40, 50)).save(tmp_path / "a.png")
    (tmp_path / "z.png").touch()
    out = ["--out", str(tmp_path / "out")]
    assert tool.main(["best.pt", str(tmp_path), *out]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["1 image labelled, 1 problem:", f"  {tmp_path / 'z.png'}: the file is empty (0 bytes)."]
    assert tool.main(["best.pt", str(tmp_path / "no*.png"), *out]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no*.png'}: no such file or no image in it.\n"
    assert tool.main(["broken.pt", str(tmp_path / "a.png"), *out]) == 2
    assert "error: broken.pt: not a checkpoint." in capsys.readouterr().err
    assert tool.main(["best.pt", str(tmp_path / "a.png"), *out, "--save", "colour"]) == 2
    assert "Cannot save colour; choose from labels, color, overlay" in capsys.readouterr().err
    assert tool.main(["best.pt", str(tmp_path / "a.png"), *out, "--max-megapixels", "0.001"]) == 1
    assert "a.png: 0.002 megapixels, the limit is 0.001" in capsys.readouterr().out


def test_help_loads_no_heavy_library() -> None:
    code = f"import sys, runpy; sys.argv = ['predict.py', '--help']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    probe = (
        f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'numpy' in sys.modules)); {code}"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "--max-megapixels" in done.stdout and done.stdout.endswith("False False\n")


@pytest.mark.parametrize("limit", ["inf", "nan", "0", "-1"])
def test_a_limit_that_is_none_is_one_error(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    assert tool.main(["best.pt", str(tmp_path), "--out", str(tmp_path / "out"), "--max-megapixels", limit]) == 2
    assert f"--max-megapixels: {limit}; expected a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "text"), [("--max-megapixels", "is for images"), ("--smooth", "is for a video")])
def test_options_of_the_other_kind_of_input_are_refused(
    tool: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    text: str,
) -> None:
    monkeypatch.setattr(checkpoint, "task", lambda path: "seg")
    given = tmp_path / ("x.mp4" if option == "--max-megapixels" else "x.png")
    assert tool.main(["best.pt", str(given), "--out", str(tmp_path / "out"), option, "1"]) == 2
    assert f"error: {option}: {text}" in capsys.readouterr().err
