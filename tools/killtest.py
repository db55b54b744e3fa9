"""Kill trainings at random moments, go on with --resume auto, and compare their ends with those of undisturbed ones.

python tools/killtest.py --out runs/killtest                  # 24 cases, 3 kills each
python tools/killtest.py --out runs/killtest --cases 'seg-deconv*-1p-0w' --kills 2
python tools/killtest.py --out runs/twice --kills 0 runtime.deterministic=true      # just the same training twice

A case is TASK-NORM-PROCESSESp-WORKERSw: both trainers, batch norm and both kinds of deconvolution, one and two
processes (gloo), without and with loader processes. Checkpoints are written every other step, in the middle of epochs.
Exit status: 0 nothing was lost, 1 something was (listed).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configs of all cases")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs; must not exist")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help="which of the cases")
    parser.add_argument("--kills", type=int, default=3, help="for each case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_intermixed_args()
    os.environ.update(NO_ALBUMENTATIONS_UPDATE="1", OMP_NUM_THREADS="1")
    for name in ("albumentations", "classify.train", "seg.train", "matplotlib.figure"):
        importlib.import_module(name)  # once, and not in each of a hundred processes
    from engine import killtest
    from tools import make_sample, train

    if args.out.exists():
        raise UserError(f"{args.out}: exists already; choose another --out")
    killtest.check(args.overrides)
    root, data = Path(__file__).resolve().parent.parent, args.out / "data"
    seg = [str(root / "tests/killtest_seg.yaml"), f"data.root={data}", *args.overrides]
    images = f"data.root={data}/leftImg8bit"  # with the cities as classes
    classify = [str(root / "tests/killtest_classify.yaml"), images, *args.overrides]
    chosen = [one for one in killtest.cases(seg, classify) if any(fnmatch(one.name, part) for part in args.cases)]
    if not chosen:
        raise UserError(f"--cases: nothing matches {' '.join(args.cases)}; a case is such as seg-bn-1p-0w")
    args.out.mkdir(parents=True)
    sizes = ["--size", "64x128", "--train", "17", "--val", "2", "--test", "0"]
    killtest.apart(make_sample.main, [str(data), *sizes], args.out / "data.txt")
    results = []
    for case in chosen:
        found = killtest.run(case, train.main, args.out / case.name, args.kills, args.seed)
        results.append(found)
        print(f"{case.name:24} {found.kills} kills, {found.in_a_write} in a write, at most {found.lost} steps lost")
        print("".join(f"  {one}\n" for one in found.problems), end="", flush=True)
    bad = sum(bool(one.problems) for one in results)
    kills, writes = sum(one.kills for one in results), sum(one.in_a_write for one in results)
    print(f"{len(results)} cases, {kills} kills, {writes} of them in a write: {bad or 'none'} with a difference")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
