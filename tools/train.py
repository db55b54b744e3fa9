"""Train the experiment that a config describes.

python tools/train.py configs/seg/deeplabv3_resnet50_deconv.yaml data.root=/data/cityscapes
python tools/train.py configs/classify/vgg11_cifar10.yaml norm.name=deconv norm.fc_block=512
python tools/train.py CONFIG --work-dir runs/x optim.lr=0.05 norm.name=bn
python tools/train.py CONFIG --work-dir runs/x optim.lr=0.05 norm.name=bn --resume auto     # goes on with that run
python tools/train.py CONFIG --show
python tools/train.py CONFIG --explain            # what each key means; --explain optim a section's, optim.lr one alone
python tools/train.py CONFIG --plan 11GiB
torchrun --nproc-per-node 8 tools/train.py CONFIG ...

--plan trains nothing: it measures two small steps and tells which micro_batch and runtime.checkpointing fit into that
memory (of the GPU, or of the process on a CPU) with the same batch_size.
Exit status: 0 trained; 143, 130, 138 stopped by SIGTERM, SIGINT, SIGUSR1, go on with --resume auto; 75 another process
or a loader was lost, the same; 2 a mistake in the input; 1 no plan fits.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program


def schema(task: str) -> type[Any]:
    """The config class of a task."""
    if task == "seg":
        from seg.config import SegConfig

        return SegConfig
    if task == "classify":
        from classify.config import ClassifyConfig

        return ClassifyConfig
    raise UserError(f"task: found {task!r}, expected 'seg' or 'classify'")


def _plan(loaded: Any, size: str) -> int:
    from engine.plan import parse_size

    budget = parse_size(size)
    found = importlib.import_module(f"{loaded.config.task}.plan").plan(loaded, budget)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one tells, what all have agreed on
        return 0
    print(found)
    return 1 if found.choice() is None else 0


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, such as those in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as optim.lr=0.05"
    )
    parser.add_argument("--work-dir", type=Path, help="folder for checkpoints and logs (default: runs/NAME OF CONFIG)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the work directory's last.pt, or from a file")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on though optim.lr, optim.clip_norm, micro_batch or predict.* are others than before",
    )
    parser.add_argument("--show", action="store_true", help="print the resolved config and where each key comes from")
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY", help="print what each key, or this key or section, means"
    )
    parser.add_argument("--plan", metavar="SIZE", help="print what fits into this memory, such as 11GiB, and stop")
    args = parser.parse_intermixed_args()
    from engine.config import load, show

    if args.accept_changes and args.resume is None:
        raise UserError("--accept-changes: is for a run that goes on; give --resume auto, or leave it out")
    if args.explain and "=" in args.explain:  # the first change of the config, not a key to explain
        args.overrides, args.explain = [args.explain, *args.overrides], ""
    loaded: Any = load(args.config, args.overrides, schema)
    if args.explain is not None:
        from engine.config_help import describe

        print(describe(loaded, args.explain), end="")
        return 0
    if args.show:
        print(show(loaded), end="")
        return 0
    if args.plan is not None:
        return _plan(loaded, args.plan)
    trainer = importlib.import_module(f"{loaded.config.task}.train")
    result = trainer.run(loaded, args.work_dir or Path("runs", args.config.stem), args.resume, args.accept_changes)
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    sys.exit(main())
