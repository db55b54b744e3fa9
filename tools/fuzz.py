"""Feed the programs damaged and strange files: images, videos, labels, configs, checkpoints.

python tools/fuzz.py --cases 2000 --seed 0 --work-dir runs/fuzz
python tools/fuzz.py --cases 500 --only images videos

Every case must end in a right result or in one clear error. A traceback, a hang, a wrong output without a word, a file
written outside of the output folder or code run from a file is a failure; its input is kept in WORK_DIR/failures, with
the command that repeats it, until the next run there. Exit status: 0 no failure, 1 failures, 2 a mistake in the call.
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
    parser.add_argument("--cases", type=int, default=2000, metavar="N", help="how many, of all kinds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other cases (%(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/fuzz"), help="folder to write to (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KIND", help="images videos labels configs checkpoints"
    )
    parser.add_argument(
        "--limit", type=float, default=60, metavar="S", help="seconds that a case may take (%(default)s)"
    )
    args = parser.parse_args()
    from seg.fuzz.run import fuzz
    from tools import convert_masks, evaluate, inspect, predict, train

    programs = {one.__name__.rpartition(".")[2]: one.main for one in (convert_masks, evaluate, inspect, predict, train)}
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # failures are told as they come
    report = fuzz(programs, args.cases, args.seed, args.work_dir, args.only, limit=args.limit)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
