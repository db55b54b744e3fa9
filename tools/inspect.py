"""Look at a data set before training: sizes, ids, class shares, broken or odd files; a page with pictures.

python tools/inspect.py data.root=/data/cityscapes
python tools/inspect.py configs/seg/deeplabv3_resnet50_deconv.yaml data.root=/data/cityscapes --out report.html
python tools/inspect.py data.name=bdd100k data.root=/data/bdd100k

Any data set that can be trained on (`data.name`): the splits data.train_split, data.val_split and test, and the coarse
labels if data.coarse_share takes them.

Exit status: 0 nothing wrong, 1 problems found, 2 nothing could be looked at.
"""

from __future__ import annotations

import os
import sys

# Python puts the folder of a program first on its path, where this file hides the standard library's module `inspect`
_HERE = os.path.dirname(os.path.realpath(__file__))
if __name__ in ("__main__", "inspect"):
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != _HERE]
if __name__ == "inspect":  # another program of this folder asked for the standard library's module: it gets that
    del sys.modules["inspect"]
    import inspect  # noqa: F401
else:
    import argparse
    from pathlib import Path

    sys.path.insert(0, os.path.dirname(_HERE))

    from engine.errors import UserError, one_process, program

    @program
    def main() -> int:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("words", nargs="*", metavar="CONFIG | key=value", help="a config, and changes to it")
        parser.add_argument("--out", type=Path, metavar="HTML", help="also write a page with pictures")
        args = parser.parse_intermixed_args()
        if not args.words:
            parser.error("give data.root=FOLDER, or a config")
        one_process("tools/inspect.py")
        from engine.images import check_writable
        from seg.config import data_config

        data = data_config(args.words)
        if args.out:
            if args.out.is_dir():
                raise UserError(f"--out: {args.out} is a folder; expected the name of a page, such as report.html")
            check_writable(args.out.parent)
        from seg import inspect_data, inspect_page

        found = inspect_data.inspect(data)
        print(inspect_page.text(found))
        if args.out:
            from seg.html import write

            write(args.out, inspect_page.document(found))
            print(f"page with pictures: {args.out}")
        return 1 if inspect_page.mistakes(found) else 0

    if __name__ == "__main__":
        sys.exit(main())
