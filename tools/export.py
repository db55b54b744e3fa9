"""Write a trained network for other programs, folded: nothing of its norm's statistics is left, and no code of ours.

python tools/export.py runs/x/best.pt --out model.pt2 [--size 1024 2048]   # a program
python tools/export.py runs/x/best.pt --out model.safetensors              # weights

A program, torch.export.load("model.pt2").module(), takes float32 images (N, 3, H, W), RGB in [0, 1], of the size that
is given (default: the training's), normalises them, and gives logits (N, classes, H, W), a classifier's (N, classes).
Inside, images have a shorter side of data.eval_base_size, as in predict.py; windows (predict.window) are not cut. It
holds the classes' names (extra_files={"network.json": ""}), and is compared with the network before it is kept. Weights
fit the network that the Python which is printed makes, by its library where that has it.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, one_process, program


def _segmentation(args: argparse.Namespace) -> object:
    from engine.export import export, rebuilding
    from seg.labels import table_of
    from seg.models import blank_images, call, from_checkpoint, multiple
    from seg.predict import at_shorter_side, logits_of
    from seg.smp_models import AnySize

    model, cfg, meta = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports)
    table = table_of(meta)
    side = cfg.data.eval_base_size
    facts = {"task": "seg", "classes": list(table.classes), "label_ids": list(table.label_ids), "shorter_side": side}
    size = args.size or cfg.data.crop
    logits = partial(logits_of, multiple=multiple(cfg.model), size=tuple(size))
    scale = None if side is None else partial(at_shorter_side, base_size=side)
    part = "network" if isinstance(model, AnySize) else ""
    rebuilt = rebuilding(call(cfg.model, table.num_classes), cfg.norm, blank_images()[0], part)
    return export(model, args.out, size, logits, cfg.data.mean, cfg.data.std, facts, scale, part, rebuilt)


def _classification(args: argparse.Namespace) -> object:
    from classify.network import blank_images, call, from_checkpoint
    from engine.export import export, rebuilding

    model, cfg, info = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports)
    facts = {"task": "classify", "classes": list(info.classes)}
    size = args.size or (info.size, info.size)
    rebuilt = rebuilding(call(cfg.model, info), cfg.norm, blank_images(info)[0])
    logits = lambda net, images: net(images).float()  # noqa: E731
    return export(model, args.out, size, logits, info.mean, info.std, facts, rebuilt=rebuilt)


@program
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to its config")
    parser.add_argument("--out", type=Path, required=True, help="a name in .pt2 or .safetensors; its folder is made")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of a program's images, pixels")
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    args = parser.parse_intermixed_args(argv)
    one_process("tools/export.py")
    if args.size is not None and min(args.size) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: expected a height and a width in pixels")
    from engine.checkpoint import task
    from engine.images import check_writable

    write = {"seg": _segmentation, "classify": _classification}.get(found := task(args.checkpoint))
    if write is None:
        raise UserError(f"{args.checkpoint}: a checkpoint of the task {found!r}, expected 'seg' or 'classify'")
    if args.size is not None and args.out.suffix == ".safetensors":
        raise UserError(f"--size: is for a program (.pt2); the weights in {args.out} fit images of any size")
    check_writable(args.out.parent)
    print(write(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
