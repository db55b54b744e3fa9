"""Label or classify a user's images with a trained network.

python tools/predict.py runs/x/best.pt photos/ 'more/**/*.jpg' --out labelled --save labels color overlay
python tools/predict.py runs/x/best.pt drive.mp4 --out drive_seg.mp4 [--save color] [--smooth 0.4]
python tools/predict.py runs/x/best.pt photos/ --out labelled --scales 0.75 1.0 1.25 --flip --sliding-window
python tools/predict.py runs/classifier/best.pt photos/ --topk 5 [--out predicted]

A segmentation network writes what --save names: labelled/labels/..._labelIds.png (8-bit label ids, as the test server
and `tools/evaluate.py --predictions labelled/labels ...` take them), labelled/color/..._color.png,
labelled/overlay/..._overlay.png and labelled/confidence/..._confidence.png (8-bit grey: round(255 p), where p is the
probability of the predicted class). Of a video it writes a video, by default the overlay, data.eval_batch_size frames
going through the network together; label ids need an .mkv or .avi, which keep them exactly, and there is no confidence.
A folder of frames is labelled as images, one at a time, data.eval_batch_size of its windows together. --scales, --flip
and --sliding-window average as they do in tools/evaluate.py, each image and each frame by itself. A classifier prints
the likeliest classes and, with --out, writes predictions.csv and predictions.json. Exit status: 0 all done, 1 inputs
failed (listed at the end), 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import glob
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, one_process, program
from seg.view_options import add_view_options, views


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, folder, glob in quotes, or key=value (config)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder to write to, nothing goes elsewhere, or the file of a video; a classifier can do without",
    )
    parser.add_argument(
        "--save",
        nargs="+",
        metavar="KIND",
        help="segmentation: labels, color, overlay, confidence (labels; video: overlay)",
    )
    parser.add_argument(
        "--smooth", type=float, metavar="ALPHA", help="video: weight of the newest frame in an average over the frames"
    )
    add_view_options(parser.add_argument_group("segmentation networks"))
    parser.add_argument("--topk", type=int, metavar="K", help="classification: how many classes to tell (1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="in place of the config's runtime.device")
    parser.add_argument("--max-megapixels", type=float, metavar="N", help="refuse larger images (128); not for a video")
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
    if args.smooth is not None:
        if not 0 < args.smooth <= 1:
            raise UserError(
                f"--smooth: found {args.smooth:g}, expected a weight (predict.smoothing) in (0, 1], such as 0.4"
            )
        args.overrides.append(f"predict.smoothing={args.smooth}")
    return args


def _videos(word: str, suffixes: frozenset[str]) -> list[str]:
    """Those that a pattern names which ends as they do."""
    pattern = not os.path.lexists(word) and Path(word).suffix.lower() in suffixes
    return sorted(glob.glob(word, recursive=True)) if pattern else []


def _segment(args: argparse.Namespace, max_pixels: int) -> Any:
    from engine.images import VIDEO_SUFFIXES, show
    from engine.prepare import predicting
    from engine.yaml_layers import leaves, parse_overrides
    from seg.averaging import Views, predictor_of
    from seg.label_files import label_files
    from seg.labels import table_of
    from seg.models import from_checkpoint
    from seg.video import label_video

    if args.out is None:
        raise UserError(f"{args.checkpoint}: a segmentation network; give --out DIR for its pictures")
    if args.topk is not None:
        raise UserError(f"{args.checkpoint}: a segmentation network; --topk is for a classifier")
    args.inputs = [one for word in args.inputs for one in _videos(word, VIDEO_SUFFIXES) or [word]]
    videos = [path for path in args.inputs if Path(path).suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path)]
    if videos and len(args.inputs) > 1:
        raise UserError(f"{videos[0]}: a video goes alone; found {len(args.inputs)} inputs, start the program for each")
    if args.max_megapixels is not None and videos:
        raise UserError("--max-megapixels: is for images; a video's frames have one size")
    if args.smooth is not None and not videos:
        raise UserError("--smooth: is for a video; images are labelled each for itself")
    given = dict(leaves(parse_overrides(args.overrides))).get(("predict", "smoothing"))
    if given is not None and given.value is not None and not videos:
        raise UserError("predict.smoothing: is for a video; images are labelled each for itself, leave it out")
    asked = views(args)
    model, cfg, meta = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports, folded=True)
    if asked != Views():
        print(f"predictions averaged over: {asked}")
    with predicting(cfg.runtime) as device:
        predictor = predictor_of(model, cfg, device, asked)
        if videos:
            return label_video(
                predictor.predict_batch,
                videos[0],
                args.out,
                args.save or ["overlay"],
                table=table_of(meta),
                batch_size=cfg.data.eval_batch_size,
                smoothing=cfg.predict.smoothing,
                probabilities=predictor.probabilities_batch,
            )
        kinds = args.save or ["labels"]
        table = table_of(meta)
        done = label_files(
            predictor.predict,
            args.inputs,
            args.out,
            kinds,
            table=table,
            confident=predictor.predict_confident,
            max_pixels=max_pixels,
        )
    if done.done:
        print("written to " + ", ".join(show(args.out / kind) for kind in dict.fromkeys(kinds)))
    return done


def _classify(args: argparse.Namespace, max_pixels: int) -> Any:
    from classify.network import from_checkpoint
    from classify.predict import Predictor, classify_files
    from engine.prepare import session

    given = {
        "--save": args.save,
        "--smooth": args.smooth is not None,
        "--scales": args.scales,
        "--flip": args.flip,
        "--sliding-window": args.sliding_window,
    }
    if option := next((name for name, there in given.items() if there), None):
        raise UserError(f"{args.checkpoint}: a classifier; {option} is for segmentation networks")
    model, cfg, info = from_checkpoint(args.checkpoint, args.overrides, allow_imports=args.allow_imports, folded=True)
    with session(cfg.runtime) as device:
        predict = Predictor.from_config(model, cfg, info, device).predict
        topk = 1 if args.topk is None else args.topk
        return classify_files(predict, info.classes, args.inputs, topk=topk, out=args.out, max_pixels=max_pixels)


@program
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    megapixels = 128.0 if args.max_megapixels is None else args.max_megapixels
    if not 0 < megapixels < math.inf:
        raise UserError(f"--max-megapixels: {megapixels:g}; expected a number above 0")
    one_process("tools/predict.py")
    from engine.checkpoint import task
    from engine.signals import StopRequest

    label = _classify if task(args.checkpoint) == "classify" else _segment
    with StopRequest() as stop, stop.at_once():  # what is unfinished is removed, or written as far as it goes
        summary = label(args, int(megapixels * 1e6))
    print(summary)
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
