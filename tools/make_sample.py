"""Render the sample data set: street scenes with all 19 classes in the full Cityscapes layout.

python tools/make_sample.py data/sample --size 256x512 --train 96 --val 24 --test 6 --seed 0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program


@program
def main() -> int:
    from seg import sample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write; new, empty, or rendered with the same parameters")
    parser.add_argument("--size", default="256x512", help="height x width in pixels, 64x128 to 1024x2048 (%(default)s)")
    for split, count in sample.COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"{split} images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (%(default)s)")
    args = parser.parse_args()
    counts = {split: getattr(args, split) for split in sample.COUNTS}
    root = sample.render(args.root, seed=args.seed, size=sample.parse_size(args.size), counts=counts)
    each = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{sum(counts.values())} synthetic street scenes in {root}: {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
