"""Measure the input, the scorer and the sliding window of segmentation.

python tools/benchmark_seg.py                                            # scorer and sliding window
python tools/benchmark_seg.py configs/seg/X.yaml data.root=/data/x       # the training input against the step as well

The scorer reads 2048 x 1024 label files that are rendered for it, and is timed by turns with cityscapesscripts'
evaluation. Printed are medians over --rounds, and ratios: other work on the machine slows both sides of one alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program


@program
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML file, such as those in configs/seg")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (%(default)s)")
    parser.add_argument("--images", type=int, default=24, help="label files that are scored (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    if min(args.rounds, args.images) < 1:
        parser.error("--rounds and --images must be at least 1")
    from engine.config import load
    from seg import timing
    from seg.config import SegConfig

    found: list[timing.Row] = []
    stages = None
    if args.config:  # first: its data may be missing
        found, stages = timing.loader(load(args.config, args.overrides, SegConfig).config, args.rounds)
    rows = timing.windows(
        [(None, 0.0), ((512, 1024), 0.25), ((769, 769), 0.25), ((769, 769), 1 / 3), ((512, 512), 0.5)]
    )
    with tempfile.TemporaryDirectory() as folder:
        rows += timing.scorer(*timing.render_split(Path(folder), args.images), args.rounds)
    print(timing.text(rows + found))
    if stages is not None:
        parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in stages._asdict().items())
        print(f"input, an image in one process: {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
