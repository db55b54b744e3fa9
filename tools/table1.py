"""Train the paper's Table 1 (with --data imagenet its Table 2): networks with batch norm and with deconvolution.

python tools/table1.py --epochs 1 --data cifar10 --networks vgg16 resnet18 --out runs/table1
python tools/table1.py --epochs 20 --variants bn:optim.lr=0.02 deconv:norm.block=32 --seeds 0 1 --set data.root=/data
torchrun --nproc-per-node 8 tools/table1.py --data imagenet --set data.root=/data/imagenet

Each cell is a training with a folder of its own in OUT/DATA_EPOCHSep; table.md, table.json and curves.png there are
written after each. Stopped by Ctrl-C or SIGTERM, it goes on with the same command.
Exit status: 0 the table is whole, 1 it was stopped or a cell failed, 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/table1"), help="folder of the tables (%(default)s)")
    parser.add_argument("--data", default="cifar10", help="data set, as in configs/classify/NETWORK_DATA.yaml")
    parser.add_argument("--epochs", type=int, help="length of each training (default: 1, imagenet 90)")
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="rows (default: the paper's)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["bn", "deconv"],
        metavar="NORM[:key=value,...]",
        help="columns: a norm and other keys of the config (default: bn deconv)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="trainings of each cell (default: 0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to all configs")
    parser.add_argument("--list", action="store_true", help="print the cells and what is done, train nothing")
    args = parser.parse_args()
    from classify import table
    from classify.table_cells import request

    wanted = request(
        args.out,
        data=args.data,
        epochs=args.epochs,
        networks=args.networks,
        variants=args.variants,
        seeds=args.seeds,
        overrides=args.set,
        command=shlex.join(["python", *sys.argv]),
    )
    if args.list:
        print(table.listing(wanted))
        return 0
    return 0 if table.make(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
