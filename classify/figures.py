"""Pictures of deconvolution in a trained classifier: the first layer's kernels, and a layer's whitened input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from classify.data import eval_batches
from classify.network import from_checkpoint
from engine import figures
from engine.prepare import session

MOST_IMAGES = 256


def draw(
    checkpoint: Path, out: Path, layer: str | None = None, overrides: Sequence[str] = (), *, allow_imports: bool = False
) -> list[Path]:
    """Draw `kernels.png` and `whitening.png` into a folder, the latter on a batch of validation images.

    Args:
        checkpoint: a file that tools/train.py wrote.
        out: the folder.
        layer: name of the layer whose input is shown; None: one in the middle of the network.
        overrides: `key=value` changes to the stored config, such as data.root.
        allow_imports: import the modules that the stored config names (they run code).

    Raises:
        UserError: see `classify.network.from_checkpoint` and `classify.data.eval_batches`; a network without
            deconvolution; an unknown layer; a picture that cannot be written.
    """
    model, cfg, _ = from_checkpoint(checkpoint, overrides, allow_imports=allow_imports)
    layers = figures.deconv_layers(model, checkpoint)
    name = figures.choose(layers, layer)
    with session(cfg.runtime) as device:
        images = next(iter(eval_batches(cfg, device)))["image"][:MOST_IMAGES]
        model.to(device)
        x = figures.caught(layers[name], lambda: model(images.to(device)))
        note = f"{len(images)} images of {cfg.data.name}"
        figures.draw_whitening(layers[name], name, x, out / "whitening.png", note)
    first = next(iter(layers))
    figures.draw_kernels(layers[first], first, out / "kernels.png")
    return [out / "kernels.png", out / "whitening.png"]
