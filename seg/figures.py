"""Pictures of deconvolution in a trained segmentation network: the first layer's kernels, a layer's whitened input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import figures
from engine.prepare import predicting
from seg.data import eval_batches
from seg.models import from_checkpoint
from seg.predict import Predictor


def draw(
    checkpoint: Path, out: Path, layer: str | None = None, overrides: Sequence[str] = (), *, allow_imports: bool = False
) -> list[Path]:
    """Draw `kernels.png` and `whitening.png` into a folder, the latter on the first batch of validation images.

    Args:
        checkpoint: a file that tools/train.py wrote.
        out: the folder.
        layer: name of the layer whose input is shown; None: one in the middle of the network.
        overrides: `key=value` changes to the stored config, such as data.root.
        allow_imports: import the modules that the stored config names (they run code).

    Raises:
        UserError: see `seg.models.from_checkpoint` and `seg.data.eval_batches`; a network without deconvolution; an
            unknown layer; a picture that cannot be written.
    """
    model, cfg, _ = from_checkpoint(checkpoint, overrides, allow_imports=allow_imports)
    layers = figures.deconv_layers(model, checkpoint)
    name = figures.choose(layers, layer)
    with predicting(cfg.runtime) as device:
        items = next(iter(eval_batches(cfg)))
        predictor = Predictor.from_config(model, cfg, device)
        x = figures.caught(layers[name], lambda: predictor.predict_batch([item["image"] for item in items]))
        what = "images" if len(x) == len(items) else "windows of images"  # of large ones, or with predict.window
        note = f"{len(x)} {what} of {cfg.data.val_split}"
        figures.draw_whitening(layers[name], name, x, out / "whitening.png", note)
    first = next(iter(layers))
    figures.draw_kernels(layers[first], first, out / "kernels.png")
    return [out / "kernels.png", out / "whitening.png"]
