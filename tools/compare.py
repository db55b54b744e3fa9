"""Draw runs side by side: score and loss curves, class IoUs and predictions, in one picture.

python tools/compare.py runs/bn runs/deconv --out compare.png --names "batch norm" deconvolution --examples 3
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
    parser.add_argument("runs", nargs="+", type=Path, help="work directories of tools/train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    parser.add_argument("--names", nargs="+", help="what to call the runs (default: their folders' names)")
    parser.add_argument("--examples", type=int, default=2, help="validation images to show (%(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="changes to the runs' configs, such as data.root=..."
    )
    parser.add_argument("--allow-imports", action="store_true", help="run the modules that the runs' configs import")
    args = parser.parse_args()
    if args.names and len(args.names) != len(args.runs):
        parser.error(f"{len(args.names)} names for {len(args.runs)} runs")
    from seg.compare import compare

    print(
        compare(
            args.runs,
            args.names or [run.name for run in args.runs],
            args.out,
            args.examples,
            args.set,
            args.allow_imports,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
