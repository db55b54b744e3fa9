"""Measure how much longer the input makes a training step.

python tools/benchmark_input.py configs/classify/lenet_mnist.yaml --networks lenet mlp vgg11
python tools/benchmark_input.py CONFIG data.root=/data batch_size=128 norm.name=deconv --networks lenet --rounds 30

Each network trains on batches of the config's data set; batch and step are timed by turns. Printed are the medians, and
the batch's time as a share of the step's.
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
    parser.add_argument("config", type=Path, help="a YAML file, such as those in configs/classify")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="model.name of each (default: the config's)")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed (default: 15)")
    args = parser.parse_intermixed_args()
    from classify.config import ClassifyConfig
    from classify.timing import measure
    from engine.config import load

    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    cfg = load(args.config, args.overrides, ClassifyConfig).config
    rows = measure(cfg, args.networks or [cfg.model.name], args.rounds)
    width = max(len("network"), *(len(row.network) for row in rows))
    print(f"{'network':{width}} |  step ms | input ms | share")
    for row in rows:
        print(f"{row.network:{width}} | {row.step * 1e3:8.2f} | {row.input * 1e3:8.3f} | {row.share:5.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
