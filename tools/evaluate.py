"""Score a checkpoint on a split: a segmentation network with the official Cityscapes metric, a classifier by top-1 and
top-5. Or score a folder of label PNGs with the Cityscapes metric. Or write a segmentation network's reliability card.

python tools/evaluate.py runs/x/best.pt --split val --out runs/x/val data.root=/data/cityscapes
python tools/evaluate.py runs/x/best.pt --scales 0.75 1.0 1.25 --flip --sliding-window
python tools/evaluate.py runs/x/best.pt --card [--corruptions]
python tools/evaluate.py --predictions DIR --ground-truth DIR --json scores.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program
from seg.view_options import add_view_options, views


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="best.pt or last.pt of a run")
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
    if [args.checkpoint is None, args.predictions is None, args.ground_truth is None] not in ([0, 1, 1], [1, 0, 0]):
        parser.error("give either a checkpoint, or both --predictions and --ground-truth")
    if args.predictions and (args.split or args.device or args.overrides or args.allow_imports or seg_only):
        parser.error(
            "--split, --device, --allow-imports, --scales, --flip, --sliding-window, --card and key=value go with a "
            "checkpoint, not with --predictions"
        )
    if args.predictions:
        from seg.evaluate import evaluate_folder, report

        report(evaluate_folder(args.predictions, args.ground_truth), {}, args.json, args.out)
        return 0
    from engine.checkpoint import task

    args.overrides += [f"runtime.device={args.device}"] if args.device else []
    if task(args.checkpoint) == "classify":
        if seg_only:
            raise UserError(
                f"{args.checkpoint}: a classifier; --scales, --flip, --sliding-window and --card are for segmentation "
                "networks"
            )
        from classify.evaluate import evaluate_and_report as classify_report

        classify_report(args.checkpoint, args.overrides, args.split, **_files(args))
    else:
        _segmentation(args)
    return 0


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
