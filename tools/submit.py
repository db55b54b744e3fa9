"""Predict the Cityscapes test split and pack a checked zip for the test server. The split cannot be scored here.

python tools/submit.py runs/x/best.pt --out submission.zip data.root=/data/cityscapes
python tools/submit.py runs/x/best.pt --out submission.zip --scales 0.75 1.0 1.25 --flip --sliding-window

What was interrupted goes on with the same command.
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
    parser.add_argument("--out", type=Path, required=True, help="zip file to write")
    add_view_options(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="same as runtime.device=...")
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    args = parser.parse_intermixed_args()
    one_process("tools/submit.py")
    from seg.submission import submit

    overrides = args.overrides + ([f"runtime.device={args.device}"] if args.device else [])
    print(submit(args.checkpoint, args.out, overrides, views=views(args), allow_imports=args.allow_imports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
