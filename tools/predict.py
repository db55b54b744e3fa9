"""Label or classify a user's images with a trained network.

python tools/predict.py runs/x/best.pt photos/ 'more/**/*.jpg' --out labelled --save labels color overlay
python tools/predict.py runs/classifier/best.pt photos/ --topk 5 [--out predicted]

A segmentation network writes labelled/labels/..._labelIds.png (8-bit label ids, as the test server and
`tools/evaluate.py --predictions labelled/labels` take them), labelled/color/..._color.png and
labelled/overlay/..._overlay.png. A classifier prints the likeliest classes and, with --out, writes predictions.csv and
predictions.json. Exit status: 0 all done, 1 some inputs failed (listed at the end), 2 nothing could be done.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, folder, glob in quotes, or key=value (config)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write to, nothing goes elsewhere; a classifier can do without",
    )
    parser.add_argument("--save", nargs="+", metavar="KIND", help="segmentation: labels, color, overlay (labels)")
    parser.add_argument("--topk", type=int, metavar="K", help="classification: how many classes to tell (1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="in place of the config's runtime.device")
    parser.add_argument(
        "--max-megapixels", type=float, default=128, metavar="N", help="refuse larger images (%(default)s)"
    )
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    args = parser.parse_intermixed_args(argv)
    saved = args.save or []
    words = [*args.inputs, *(word for word in saved if "=" in word)]
    args.save = [word for word in saved if "=" not in word]
    args.overrides = [w for w in words if re.match(r"[a-z_]+(\.\w+)*=", w) and not os.path.lexists(w)]
    args.inputs = [word for word in words if word not in args.overrides]
    if args.device:
        args.overrides.append(f"runtime.device={args.device}")
    return args


def _segment(args: argparse.Namespace, max_pixels: int) -> Any:
    from engine.prepare import session
    from seg.label_files import label_files
    from seg.models import from_checkpoint
    from seg.predict import Predictor

    if args.out is None or args.topk is not None:
        raise UserError(f"{args.checkpoint}: a segmentation network; give --out DIR for its pictures, and no --topk")
    model, cfg, _ = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports)
    with session(cfg.runtime) as device:
        predict = Predictor.from_config(model, cfg, device).predict
        return label_files(predict, args.inputs, args.out, args.save or ["labels"], max_pixels=max_pixels)


def _classify(args: argparse.Namespace, max_pixels: int) -> Any:
    from classify.network import from_checkpoint
    from classify.predict import Predictor, classify_files
    from engine.prepare import session

    if args.save:
        raise UserError(f"{args.checkpoint}: a classifier; --save is for segmentation networks")
    model, cfg, info = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports)
    with session(cfg.runtime) as device:
        predict = Predictor.from_config(model, cfg, info, device).predict
        topk = 1 if args.topk is None else args.topk
        return classify_files(predict, info.classes, args.inputs, topk=topk, out=args.out, max_pixels=max_pixels)


@program
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from engine.checkpoint import task

    label = _classify if task(args.checkpoint) == "classify" else _segment
    summary = label(args, int(args.max_megapixels * 1e6))
    print(summary)
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
