"""Train the experiment that a config describes.

python tools/train.py configs/seg/deeplabv3_resnet50_deconv.yaml data.root=/data/cityscapes
python tools/train.py configs/classify/vgg11_cifar10.yaml norm.name=deconv norm.fc_block=512
python tools/train.py CONFIG --resume auto --work-dir runs/x optim.lr=0.05 norm.name=bn
python tools/train.py CONFIG --show
torchrun --nproc-per-node 8 tools/train.py CONFIG ...

Exit status: 0 trained, 1 stopped by a signal (go on with --resume auto), 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import importlib
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


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, such as those in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as optim.lr=0.05"
    )
    parser.add_argument("--work-dir", type=Path, help="folder for checkpoints and logs (default: runs/NAME OF CONFIG)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the work directory's last.pt, or from a file")
    parser.add_argument("--show", action="store_true", help="print the resolved config and where each key comes from")
    args = parser.parse_intermixed_args()
    from engine.config import load, show

    loaded: Any = load(args.config, args.overrides, schema)
    if args.show:
        print(show(loaded), end="")
        return 0
    trainer = importlib.import_module(f"{loaded.config.task}.train")
    result = trainer.run(loaded, args.work_dir or Path("runs", args.config.stem), args.resume)
    return 1 if result.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
