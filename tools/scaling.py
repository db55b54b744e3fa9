"""Step time and traffic of an experiment on one and two processes, measured; the traffic's time on many GPUs, computed.

python tools/scaling.py configs/classify/resnet18_cifar10.yaml model.options.width=0.25 micro_batch=16
python tools/scaling.py configs/seg/deeplabv3_resnet50_80k_deconv.yaml --gpus 8 64 1024 --processes   # computed only

Each process computes on one CPU thread with a micro-batch of its own, of random images; no data set is read. The
computed table is for GPUs and was measured on none: see engine/scaling.py for its formulas and their sources.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program

VARIANTS = {
    "bn": ["norm.name=bn"],
    "deconv": ["norm.name=deconv"],
    "deconv, sync": ["norm.name=deconv", "norm.sync=true"],
    "deconv_fast": ["norm.name=deconv_fast"],
    "deconv_fast, sync": ["norm.name=deconv_fast", "norm.sync=true"],
}
_OWN = {
    "norm.name": "the variants differ in it",
    "norm.sync": "the variants differ in it",
    "runtime.device": "processes compute on CPUs here",
}


@program
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--rounds", type=int, default=5, help="how often steps are timed (%(default)s)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="none: compute only")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024], help="(%(default)s)")
    args = parser.parse_intermixed_args(argv)
    if min([args.rounds, *args.processes]) < 1 or min(args.gpus) < 2:
        parser.error("--rounds and --processes must be at least 1, --gpus at least 2")
    from engine import scaling
    from engine.config import load
    from engine.grid import refuse
    from tools.train import schema

    refuse(args.overrides, _OWN)
    more = [*args.overrides, "runtime.device=cpu"]
    configs = {label: load(args.config, [*more, *keys], schema).config for label, keys in VARIANTS.items()}
    workload = importlib.import_module(f"{configs['bn'].task}.plan").workload
    variants = [scaling.Variant(label, cfg) for label, cfg in configs.items()]
    steps = scaling.steps(workload, variants)  # first: a mistake in the config shows here, and not in other processes
    if args.processes:
        counts = ", ".join(map(str, args.processes))
        print(f"measuring {args.rounds + 2} rounds of {len(variants)} variants in {counts} processes ...", flush=True)
        print(scaling.measured_table(scaling.measure(workload, variants, args.processes, args.rounds)))
    print(f"\ncomputed, ms a step: gradients + buffers + statistics\n{scaling.computed_table(steps, args.gpus)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
