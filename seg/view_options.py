"""The options of a program that say what predictions are averaged over; see `seg.averaging.Views`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seg.averaging import Views


def add_view_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Let a program take --scales, --flip and --sliding-window."""
    parser.add_argument(
        "--scales", nargs="+", type=float, metavar="S", help="average probabilities of these scales (1.0)"
    )
    parser.add_argument("--flip", action="store_true", help="average over each scale and its mirror image")
    parser.add_argument(
        "--sliding-window",
        action="store_true",
        help="average over overlapping windows (predict.window, or of the size of a training crop), each pixel "
        "weighted by its distance from the window's edge",
    )


def views(args: argparse.Namespace) -> Views:
    """What was asked for."""
    from seg.averaging import Views

    return Views(tuple(args.scales or (1.0,)), args.flip, args.sliding_window)
