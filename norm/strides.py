"""How much the statistics look at: the channels of a block, and the grid of windows that are taken."""

from __future__ import annotations

import math
from typing import Literal

Grouping = Literal["channel", "published"]
Pair = tuple[int, int]
_SMALL_MAP = 64
_FEWEST_WINDOWS = 36


def resolve_block(channels: int, block: int) -> int:
    """Channels a block holds: `block`, at most `channels`; gcd of both where `block` does not divide `channels`."""
    return channels if block > channels else math.gcd(block, channels)


def largest_block(channels: int, most: int) -> int:
    """The largest divisor of `channels` that is at most `most`, at least 1."""
    return max((d for d in range(1, min(channels, most) + 1) if channels % d == 0), default=1)


def output_size(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Positions of a convolution in both directions."""
    each = zip(size, kernel_size, stride, padding, dilation, strict=True)
    height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in each)
    return height, width


def dense_strides(positions: Pair, most: int) -> Pair:
    """Sampling strides that leave no small map with a corner or two: where the convolution has up to 8 positions in a
    direction every one is taken, up to 16 every second, beyond that every `most`-th; never fewer than every `most`-th.

    At stride 3 a 1x1 convolution sees one of eight images in an image-pooling branch: a covariance of one row is eps I,
    and the layer amplifies by eps^(-1/2).
    """
    height, width = (min(most, 1 if side <= 8 else 2 if side <= 16 else most) for side in positions)
    return height, width


def list_covers(width: int, strides: Pair) -> bool:
    """Whether every n-th pixel of the list of all, n the product of the strides, lies all over maps of this width.

    The columns that it visits are gcd(n, width) apart, for every 64th pixel of a map 64 wide as far as there is no
    other than the first; a grid's are the root of n apart. Else the list is better, since it shifts from row to row.
    """
    return math.gcd(strides[0] * strides[1], width) ** 2 <= strides[0] * strides[1]


def middles(positions: Pair, strides: Pair, stride: Pair) -> Pair:
    """Where a grid begins, in pixels, that takes the middle of each cell of `strides` positions, which are `stride`
    pixels apart: beginning with the first row and column it would see the borders too often."""
    down, across = ((min(s, n) - 1) // 2 * t for s, n, t in zip(strides, positions, stride, strict=True))
    return down, across


def thin_out(images: int, blocks: int, positions: Pair, strides: Pair, most_rows: int) -> tuple[int, Pair]:
    """(take every so many-th image, sampling strides) that leave about `most_rows` rows: on small maps from two thirds
    to less than twice as many, unless that were a single image.

    Statistics depend on a window's place, so small maps (up to 64 windows) keep all windows and lose images. Those that
    are taken are an odd number apart, since batches may have an order: of pairs, or clips of eight frames, every second
    image, or every eighth, is of one kind. On larger maps an image's mean and scale are not the batch's: all images
    stay, and the grid gets coarser, down to 36 windows.
    """

    def windows(each: Pair) -> int:
        return -(-positions[0] // each[0]) * -(-positions[1] // each[1])

    if windows(strides) > _SMALL_MAP:
        while images * blocks * windows(strides) > most_rows:
            wider = (strides[0] + 1, strides[1] + 1)
            if windows(wider) < _FEWEST_WINDOWS:
                break
            strides = wider
        return 1, strides
    apart = images * blocks * windows(strides) // most_rows
    most = images - 1 - images % 2  # odd, and leaves two images
    return max(1, min(apart + (apart % 2 == 0), most)), strides
