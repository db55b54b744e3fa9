"""Score a checkpoint on a split: a segmentation network with the official Cityscapes metric, a classifier by top-1 and
top-5. Or score a folder of label PNGs, of Cityscapes or another data set. Or write a segmentation network's reliability
card.

python tools/evaluate.py runs/x/best.pt --split val --out runs/x/val data.root=/data/cityscapes
python tools/evaluate.py runs/x/best.pt --scales 0.75 1.0 1.25 --flip --sliding-window
python tools/evaluate.py runs/x/best.pt --card [--corruptions]
python tools/evaluate.py --predictions DIR --ground-truth DIR --json scores.json
python tools/evaluate.py --predictions DIR data.name=kitti data.root=/data/kitti --split val

With --ground-truth the files of both folders are called as Cityscapes'. With a data set (a config, key=value) there is
one PNG for each image of the split and no other, called as the image, as tools/predict.py writes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, one_process, program
from seg.view_options import add_view_options, views


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="?", help="best.pt or last.pt of a run; with --predictions a config, for its data set"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to its config")
    parser.add_argument("--split", help="split to score (default: the config's data.val_split)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="same as runtime.device=...")
    parser.add_argument("--predictions", type=Path, help="folder of predicted label-id PNGs to score, not a model")
    parser.add_argument("--ground-truth", type=Path, help="folder of *_gtFine_labelIds.png, such as gtFine/val")
    parser.add_argument(
        "--json", type=Path, help="file for all scores (default with a checkpoint: scores.json in --out)"
    )
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for pictures (default with a checkpoint: scores_SPLIT beside it)"
    )
    group = parser.add_argument_group("segmentation networks")
    add_view_options(group)
    group.add_argument("--card", action="store_true", help="write the reliability card: card.html, card.json in --out")
    group.add_argument("--corruptions", action="store_true", help="with --card: robustness (65 more passes)")
    group.add_argument(
        "--corruption-images", type=int, metavar="N", help="with --corruptions: of N images only, evenly spread"
    )
    args = parser.parse_intermixed_args()
    seg_only = args.scales or args.flip or args.sliding_window or args.card
    if (args.corruptions and not args.card) or (args.corruption_images is not None and not args.corruptions):
        parser.error("--corruptions goes with --card, --corruption-images with --corruptions")
    args.words = words = [*([args.checkpoint] if args.checkpoint else []), *args.overrides]
    if args.predictions is None and (args.checkpoint is None or args.ground_truth):
        parser.error("give a checkpoint, or --predictions with --ground-truth or with a data set")
    if args.predictions and args.checkpoint and args.checkpoint.endswith(".pt"):
        parser.error(f"--predictions scores a folder, without the checkpoint {args.checkpoint}; leave one of them out")
    if args.predictions and bool(words) == bool(args.ground_truth):
        parser.error(
            "with --predictions give either --ground-truth, or a data set: data.name=... data.root=..., or a config"
        )
    if args.predictions and (args.device or args.allow_imports or seg_only or (args.split and args.ground_truth)):
        parser.error(
            "--device, --allow-imports, --scales, --flip, --sliding-window and --card go with a checkpoint, not with "
            "--predictions, and --split not with --ground-truth"
        )
    args.seg_only = seg_only
    return args


@program
def main() -> int:
    args = parse()
    if args.predictions or args.card:
        one_process(f"tools/evaluate.py --{'predictions' if args.predictions else 'card'}")
    if args.predictions:
        _score_folder(args)
        return 0
    args.checkpoint = Path(args.checkpoint)
    from engine.checkpoint import task

    args.overrides += [f"runtime.device={args.device}"] if args.device else []
    if task(args.checkpoint) == "classify":
        if args.seg_only:
            raise UserError(
                f"{args.checkpoint}: a classifier; --scales, --flip, --sliding-window and --card are for segmentation "
                "networks"
            )
        from classify.evaluate import evaluate_and_report as classify_report

        classify_report(args.checkpoint, args.overrides, args.split, **_files(args))
    else:
        _segmentation(args)
    return 0


def _score_folder(args: argparse.Namespace) -> None:
    from engine.images import check_file, check_writable
    from seg.config import data_config
    from seg.evaluate import evaluate_folder, evaluate_predictions, report

    if args.json:
        check_file(args.json)
    for folder in filter(None, (args.out, args.json and args.json.parent)):
        check_writable(folder)
    if args.words:
        scores = evaluate_predictions(args.predictions, data_config(args.words), args.split)
    else:
        scores = evaluate_folder(args.predictions, args.ground_truth)
    report(scores, {}, args.json, args.out)


def _segmentation(args: argparse.Namespace) -> None:
    from seg.averaging import Views

    if not args.card:
        from seg.evaluate import evaluate_and_report

        asked = views(args)
        chosen = asked if asked != Views() else None
        evaluate_and_report(args.checkpoint, args.overrides, args.split, views=chosen, **_files(args))
        return
    from seg.card_page import write_card

    print(
        write_card(
            args.checkpoint,
            args.overrides,
            args.split,
            views=views(args),
            corruptions=args.corruptions,
            corruption_images=args.corruption_images,
            **_files(args),
        )
    )


def _files(args: argparse.Namespace) -> dict[str, Any]:
    return {"json_file": args.json, "out": args.out, "allow_imports": args.allow_imports}


if __name__ == "__main__":
    sys.exit(main())
