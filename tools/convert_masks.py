"""Turn masks that show labels as colours, or hold label ids in three equal channels, into the PNGs of label ids that
training reads.

python tools/convert_masks.py color_masks/train OUT/masks/train --labels OUT/labels.yaml
python tools/convert_masks.py VOC_colours OUT --table voc

Each colour, with --ids each value, must be that of one label in the table; one that isn't is an error that names file
and colour.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import program

TABLES = ("cityscapes", "camvid", "bdd100k", "kitti", "acdc", "voc")


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="folder of colour images, with folders below it")
    parser.add_argument("out", type=Path, help="folder to write to; nothing goes elsewhere")
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--labels", type=Path, help="a labels.yaml (see seg/label_yaml.py)")
    table.add_argument("--table", choices=TABLES, help="the table of a data set")
    parser.add_argument("--ids", action="store_true", help="the channels are equal and hold label ids, not colours")
    args = parser.parse_args()
    from seg import label_tables, label_yaml
    from seg.color_masks import convert_masks

    labels = label_tables.TABLES[args.table] if args.table else label_yaml.read_table(args.labels)
    print(f"{convert_masks(args.masks, args.out, labels, args.ids)} masks converted, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
