"""Write a page of a segmentation network's errors: worst images, largest confusions as crops, suspected label errors.

python tools/errors.py runs/x/best.pt --out errors.html
python tools/errors.py runs/x/best.pt --out errors.html --split train --worst 20 --by pixels --suspects 50
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import one_process, program
from seg.view_options import add_view_options, views


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a segmentation run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to its config")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="page to write")
    parser.add_argument("--split", help="split with labels (default: the config's data.val_split)")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="images shown (%(default)s)")
    parser.add_argument("--by", default="miou", help="worst by miou or by wrong pixels: miou, pixels (%(default)s)")
    parser.add_argument("--suspects", type=int, default=12, metavar="N", help="label errors shown (%(default)s)")
    add_view_options(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="same as runtime.device=...")
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    args = parser.parse_intermixed_args()
    one_process("tools/errors.py")
    from seg.errors_page import write_errors

    overrides = args.overrides + ([f"runtime.device={args.device}"] if args.device else [])
    text = write_errors(
        args.checkpoint,
        args.out,
        overrides,
        args.split,
        worst=args.worst,
        by=args.by,
        suspects=args.suspects,
        views=views(args),
        allow_imports=args.allow_imports,
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
