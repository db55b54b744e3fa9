"""Train one config with several norms at several micro-batches, and draw what each gives and costs.

python tools/normlab.py configs/seg/sample.yaml --norms bn gn deconv --batch 1 2 4 8 --out runs/lab
python tools/normlab.py CONFIG data.root=/data --norms bn:optim.lr=0.02 deconv --batch 2 8 --seeds 0 1 2 --out runs/lab
python tools/normlab.py CONFIG --norms bn gn --batch 1 2 4 --whole --out runs/lab

A cell is a training by tools/train.py with a folder of its own in OUT. --batch names micro-batches: the batch_size of
the config stays, gradients are accumulated, and cells differ in nothing but what the norm sees at once: where the
config counts micro-batches (norm.precise_batches, calibrate_batches), all cells take as many images. With --whole they
are the batch_size itself and optim.lr is scaled with it. OUT gets lab.md, lab.json and lab.png, anew after each
cell. Stopped by Ctrl-C or SIGTERM, it goes on with the same command; a cell that fails does not stop the others.
Exit status: 0 the grid is whole, 1 it was stopped or a cell failed, 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program


@program
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of all cells")
    parser.add_argument(
        "--norms", nargs="+", default=["bn", "gn", "deconv"], metavar="NORM[:key=value,...]", help="(bn gn deconv)"
    )
    parser.add_argument("--batch", nargs="+", type=int, required=True, metavar="N", help="micro-batches")
    parser.add_argument("--whole", action="store_true", help="N is batch_size; optim.lr is scaled with it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="trainings of each cell (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/normlab"),
        help="folder of the lab (%(default)s); its table holds what this call names, and what is trained stays",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and what is done, train nothing")
    args = parser.parse_intermixed_args(argv)
    from engine import grid, normlab
    from tools.train import schema

    norms = [word for word in args.norms if "=" not in word.partition(":")[0]]  # keys may follow the norms
    wanted = normlab.request(
        args.config,
        args.out,
        norms=norms,
        batches=args.batch,
        seeds=args.seeds,
        overrides=[*args.overrides, *(word for word in args.norms if word not in norms)],
        whole=args.whole,
        command=shlex.join(["python", *(sys.argv if argv is None else ["tools/normlab.py", *argv])]),
    )
    if args.list:
        print(grid.listing(normlab.cells(wanted, schema)))
        return 0
    train = [sys.executable, str(Path(__file__).resolve().parent / "train.py")]
    return 0 if normlab.make(wanted, schema, train) else 1


if __name__ == "__main__":
    sys.exit(main())
