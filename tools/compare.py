"""Draw runs side by side: score and loss curves and class scores, of segmentation also predictions, in one picture.

python tools/compare.py runs/bn runs/deconv --out compare.png --names "batch norm" deconvolution --examples 3
python tools/compare.py runs/a0 runs/a1 runs/b0 runs/b1 --names a a b b --out seeds.png

Runs that --names calls the same are seeds of one experiment: their mean, their deviation, and whether a difference is
more than chance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, one_process, program


def task_of(runs: list[Path]) -> str:
    """The task that all runs have in common."""
    from engine.runs import config

    tasks = {run: str(config(run)["task"]) for run in runs}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{run}: {task}" for run, task in tasks.items())
        raise UserError(f"the runs are of several tasks ({listed}); compare runs of one task")
    task = tasks[runs[0]]
    if task not in ("seg", "classify"):
        raise UserError(f"{runs[0]}: a run of the task {task!r}, expected 'seg' or 'classify'")
    return task


def names_of(runs: list[Path]) -> list[str]:
    """The folders' names; their paths where two have the same name."""
    names = [run.name if run.name not in ("", "..") else run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="work directories of tools/train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    parser.add_argument(
        "--names", nargs="+", help="what to call the runs (default: their folders); one for several: seeds"
    )
    seg = parser.add_argument_group("segmentation only")
    seg.add_argument("--examples", type=int, metavar="N", help="validation images to show (2)")
    seg.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="changes to the runs' configs, such as data.root=..."
    )
    seg.add_argument("--allow-imports", action="store_true", help="run the modules that the runs' configs import")
    args = parser.parse_args()
    one_process("tools/compare.py")
    from engine.runs import other_data

    if args.examples is not None and args.examples < 0:
        parser.error(f"--examples: {args.examples}; expected 0 or more")
    if args.examples == 0 and (args.set or args.allow_imports):
        parser.error("--set and --allow-imports are for the examples, of which --examples 0 shows none")
    if args.names and len(args.names) != len(args.runs):
        parser.error(f"{len(args.names)} names for {len(args.runs)} runs")
    names = args.names or names_of(args.runs)
    task = task_of(args.runs)
    notes = other_data(args.runs)
    if args.names and len(set(names)) < len(names):
        from engine import seeds

        if args.examples is not None or args.set or args.allow_imports:
            parser.error("--examples, --set and --allow-imports go with runs that each have a name of their own")
        found = seeds.groups(args.runs, names)
        told = [*seeds.cut_short(found), *seeds.same_seeds(found), *seeds.unlike(found)]
        print("\n".join([seeds.compare(found, args.out), *told, *notes]))
        return 0
    if task == "classify":
        if args.examples is not None or args.set or args.allow_imports:
            parser.error("--examples, --set and --allow-imports go with segmentation runs; these are of classification")
        from classify.compare import compare as compare_classify

        print("\n".join([compare_classify(args.runs, names, args.out), *notes]))
        return 0
    from seg.compare import compare as compare_seg

    examples = 2 if args.examples is None else args.examples
    print("\n".join([compare_seg(args.runs, names, args.out, examples, args.set, args.allow_imports), *notes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
