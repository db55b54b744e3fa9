"""Score a checkpoint on a split: a segmentation network with the official Cityscapes metric, a classifier by top-1 and
top-5. Or score a folder of label PNGs with the Cityscapes metric.

python tools/evaluate.py runs/x/best.pt --split val --out runs/x/val data.root=/data/cityscapes
python tools/evaluate.py --predictions DIR --ground-truth DIR --json scores.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program


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
    args = parser.parse_intermixed_args()
    if [args.checkpoint is None, args.predictions is None, args.ground_truth is None] not in ([0, 1, 1], [1, 0, 0]):
        parser.error("give either a checkpoint, or both --predictions and --ground-truth")
    if args.predictions and (args.split or args.device or args.overrides or args.allow_imports):
        parser.error("--split, --device, --allow-imports and key=value go with a checkpoint, not with --predictions")
    if args.predictions:
        from seg.evaluate import evaluate_folder, report

        report(evaluate_folder(args.predictions, args.ground_truth), {}, args.json, args.out)
        return 0
    from engine.checkpoint import task

    overrides = args.overrides + ([f"runtime.device={args.device}"] if args.device else [])
    if task(args.checkpoint) == "classify":
        from classify.evaluate import evaluate_and_report
    else:
        from seg.evaluate import evaluate_and_report
    evaluate_and_report(
        args.checkpoint, overrides, args.split, json_file=args.json, out=args.out, allow_imports=args.allow_imports
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
