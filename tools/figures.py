"""Draw what deconvolution does in a trained network: its first kernels, and a layer's input before and after whitening.

python tools/figures.py runs/x/best.pt --out pictures
python tools/figures.py runs/x/best.pt --out pictures --layer layer2.0.conv1 data.root=/data
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .pt file of tools/train.py, trained with norm.name=deconv")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to its config")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.png and whitening.png")
    parser.add_argument("--layer", metavar="NAME", help="layer whose input is shown (default: one in the middle)")
    parser.add_argument(
        "--allow-imports", action="store_true", help="run the modules that the checkpoint's config imports"
    )
    args = parser.parse_intermixed_args()
    from engine.checkpoint import task

    if (found := task(args.checkpoint)) == "classify":
        from classify.figures import draw
    elif found == "seg":
        from seg.figures import draw
    else:
        raise UserError(f"{args.checkpoint}: a checkpoint of the task {found!r}, expected 'seg' or 'classify'")
    for path in draw(args.checkpoint, args.out, args.layer, args.overrides, allow_imports=args.allow_imports):
        print(f"drawn in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
