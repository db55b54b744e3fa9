"""Which patches the statistics are taken from, how they are gathered, and how a gradient of theirs goes back.

Everything is linear: `gather` picks patches from a layer's input, `scatter_add_` adds what belongs to them to a
gradient of that input, in place, so that no tensor of the input's size is made for the few values that were picked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from norm.strides import Grouping, Pair, output_size

_FEW_IMAGES = 64
"""Up to so many, slices of each are faster than indices (CPU)."""
_LITTLE, _LARGE = 2**22, 2**25
"""Values whose copy takes a GPU less time than the start of another kernel or two; of several."""


class Sampler(Protocol):
    """Picks the patches that a layer's statistics are taken from."""

    @property
    def features(self) -> int:
        """F, of a block."""

    def gather(self, x: Tensor) -> Tensor:
        """The patches, (F, rows) or (M, F, rows), in the dtype of x."""

    def scatter_add_(self, x: Tensor, patches: Tensor) -> None:
        """Add each value of `patches` to where `gather` would take it from x; the adjoint of `gather`."""

    def pieces(self, x: Tensor) -> Tensor:
        """The patches as they are unfolded, (N, C k_h k_w, rows of an image), which `apart` reads."""

    def spread(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """The adjoint of `gather` as a tensor of x's shape, in few expressions for the compiler; for one process."""

    def add_pieces_(self, x: Tensor, pieces: Tensor) -> None:
        """The adjoint of `pieces`, added to x."""

    def apart(self, pieces: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A view of pieces with four dimensions, among them features (and blocks, if each has its own D); which ones
        are not those."""

    def rows(self, shape: torch.Size) -> int:
        """How many patches `gather` takes from an x of this shape."""


@dataclass(frozen=True)
class Windows:
    """The sampled windows of a convolution over images (N, C, H, W).

    The zero-padded windows at every `strides`-th position; or of a `listed` 1x1 kernel every (product of `strides`)-th
    pixel of the flattened N x H x W list, whatever the padding.
    """

    kernel_size: Pair
    strides: Pair
    """The sampling's strides times the convolution's."""
    padding: Pair
    dilation: Pair
    features: int
    matrices: int = 1
    """D's: 1, or as many as blocks."""
    grouping: Grouping = "channel"
    images: int = 1
    """Every so many-th image is taken."""
    before: int = 0
    """Images that other processes have before these: all of them are counted together, to take every so many-th."""
    listed: bool = False
    """Of a 1x1 kernel: as the authors take them (`strides.list_covers`)."""
    start: Pair = (0, 0)
    """Where the grid of a 1x1 kernel that is not listed begins."""

    def gather(self, x: Tensor) -> Tensor:
        whole = self.listed or self._of_pixels(x) or self.interleaved(x.shape[1]) or x.device.type != "cpu"
        if whole or torch.compiler.is_compiling():
            return group_patches(self.pieces(x), self.features, self.matrices, self.grouping)
        return self._copied(self._taken(x))

    def pieces(self, x: Tensor) -> Tensor:
        x = self._taken(x)
        if self.listed:
            return self._pixels(x)
        if self._grid():
            picked = self._picked(x)
            return picked.permute(0, 2, 3, 1).flatten(1, 2).mT if self._of_pixels(x) else picked.flatten(2)
        if x.device.type != "cpu" and not torch.compiler.is_compiling() and len(x) > 4:
            padded = math.prod(side + 2 * p for side, p in zip(x.shape[2:], self.padding, strict=True))
            if len(x) * x.shape[1] * padded <= max(1.5 * x.numel(), _LITTLE):
                return self._strided(x)
        return F.unfold(x, self.kernel_size, self.dilation, self.padding, self.strides)

    def _strided(self, x: Tensor) -> Tensor:
        """As `F.unfold`, which starts one kernel an image on a GPU; here they are two or three, and x is copied once
        where it has a padding."""
        top, left = self.padding
        counts = self._counts((x.shape[2], x.shape[3]))
        if top or left:
            x = F.pad(x, (left, left, top, top))
        each, channel, *pixel = x.stride()
        inside = (step * d for step, d in zip(pixel, self.dilation, strict=True))
        between = (step * s for step, s in zip(pixel, self.strides, strict=True))
        size = (*x.shape[:2], *self.kernel_size, *counts)
        return x.as_strided(size, (each, channel, *inside, *between)).reshape(len(x), -1, math.prod(counts))

    def apart(self, pieces: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.matrices > 1:
            return pieces.unflatten(1, (self.matrices, self.features)), (0, 3)
        if self.grouping == "channel":
            return pieces.unflatten(1, (-1, self.features)), (0, 1, 3)
        return pieces.unflatten(1, (self.features, -1)), (0, 2, 3)

    def _copied(self, x: Tensor) -> Tensor:
        """As `F.unfold` and `group_patches`, in one pass: im2col on a CPU takes several times as long."""
        x = x.unflatten(1, (-1, self.channels(x.shape[1])))
        images, blocks, channels, *size = x.shape
        counts = self._counts((size[0], size[1]))
        rows = x.new_zeros(channels, *self.kernel_size, images, blocks, *counts)
        for top, (windows_down, down) in self._inside(0, size[0], counts[0]):
            for left, (windows_across, across) in self._inside(1, size[1], counts[1]):
                rows[:, top, left, :, :, windows_down, windows_across] = x[..., down, across].permute(2, 0, 1, 3, 4)
        return rows.view(*([self.matrices] if self.matrices > 1 else []), self.features, -1)

    def scatter_add_(self, x: Tensor, patches: Tensor) -> None:
        images, channels = self._taken(x).shape[:2]
        if patches.shape[-1] == 0:  # other processes have all images that are taken
            return
        if self.listed and not self._whole_images(x):
            images = 1
        total = channels * math.prod(self.kernel_size)
        self.add_pieces_(x, ungroup_patches(patches, images, total, self.matrices, self.grouping))

    def spread(self, patches: Tensor, shape: torch.Size) -> Tensor:
        images, channels, height, width = shape
        taken, pixels, every = -(-images // self.images), height * width, math.prod(self.strides)
        apart = not self.listed or pixels % every == 0  # pieces of each image
        total = channels * math.prod(self.kernel_size)
        pieces = ungroup_patches(patches, taken if apart else 1, total, self.matrices, self.grouping)
        if self.listed:
            each = _every(pieces, every)[..., : pixels if apart else taken * pixels]
            each = each.view(-1, channels, pixels) if apart else each.view(channels, taken, pixels).transpose(0, 1)
            found = each.reshape(taken, channels, height, width)
        elif self._grid():
            counts, (top, left) = self._counts((height, width)), self.start
            each = _every(pieces.reshape(taken, channels, *counts), self.strides[1])
            each = F.pad(each, (left, width - left - each.shape[-1]))
            each = _every(each.mT, self.strides[0])
            found = F.pad(each, (top, height - top - each.shape[-1])).mT
        else:
            found = F.fold(pieces, (height, width), self.kernel_size, self.dilation, self.padding, self.strides)
        return _every(found.movedim(0, -1), self.images)[..., :images].movedim(-1, 0)

    def add_pieces_(self, x: Tensor, pieces: Tensor) -> None:
        x, pieces = self._taken(x), pieces.to(x.dtype)
        n, c, height, width = x.shape
        if self.listed:
            self._add_pixels(x, pieces)
            return
        if self._grid():
            x = self._picked(x)
            x.add_(pieces.view(x.shape))
            return
        if x.device.type != "cpu" and x.numel() <= _LARGE:  # fewer kernels to start
            x.add_(F.fold(pieces, (height, width), self.kernel_size, self.dilation, self.padding, self.strides))
            return
        counts = self._counts((height, width))
        each = pieces.view(n, c, *self.kernel_size, *counts)
        for top, rows in self._inside(0, height, counts[0]):
            for left, columns in self._inside(1, width, counts[1]):
                x[:, :, rows[1], columns[1]].add_(each[:, :, top, left, rows[0], columns[0]])

    def rows(self, shape: torch.Size) -> int:
        size = (shape[2], shape[3])
        images = max(0, -(-(shape[0] - self._first()) // self.images))
        blocks = shape[1] // self.channels(shape[1])
        if self.listed:
            pixels = images * math.prod(size) - self._first_pixel(*size)
            return blocks * max(0, -(-pixels // math.prod(self.strides)))
        return images * blocks * self.count(size)

    def blocks(self, x: Tensor) -> Tensor:
        """The images that are taken, (N, C, H, W), as (N, blocks, C / blocks, H, W); blocks with D's of their own are
        one."""
        return self._taken(x).unflatten(1, (-1, self.channels(x.shape[1])))

    def count(self, size: Pair) -> int:
        """Sampled windows of an image of this size."""
        return math.prod(self._counts(size))

    def marks(self, size: Pair, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For each place in the kernel, down (k_h, H) and across (k_w, W): 1 where a sampled window has it."""
        found, counts = [], self._counts(size)
        for axis in (0, 1):
            places = _count(self.kernel_size[axis], device)[:, None] * self.dilation[axis]
            offsets = _count(size[axis], device) - (places - self.padding[axis] + self.start[axis])
            step = self.strides[axis]
            found.append(((offsets % step == 0) & (offsets >= 0) & (offsets < counts[axis] * step)).to(dtype))
        return found[0], found[1]

    def taken_images(self, images: int, device: torch.device) -> Tensor:
        """Which images have windows that are taken, (N,), bool."""
        return (_count(images, device) + self.before) % self.images == 0

    def taken_pixels(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Which pixels a list takes, (N, 1, H, W), bool."""
        images, _, height, width = shape
        image, pixel = _count(images, device) - self._first(), _count(height * width, device)
        place = image[:, None] // self.images * (height * width) + pixel - self._first_pixel(height, width)
        taken = (place % math.prod(self.strides) == 0) & (image % self.images == 0)[:, None]
        return taken.view(images, 1, height, width)

    def covered(self, shape: torch.Size) -> float:
        """Pixels in the sampled windows, with repetition, over those of the map; 0 where `marks` does not apply."""
        if self.interleaved(shape[1]) or self.listed:
            return 0.0
        size = (shape[2], shape[3])
        return self.count(size) * math.prod(self.kernel_size) / math.prod(size)

    def _first(self) -> int:
        """The first image of these that is taken."""
        return -self.before % self.images

    def _taken(self, x: Tensor) -> Tensor:
        return x[self._first() :: self.images] if self.images > 1 else x

    def _first_pixel(self, height: int, width: int) -> int:
        """Where the flattened list of these images goes on with every so many-th pixel of the whole list."""
        taken_before = -(-self.before // self.images)
        return -taken_before * height * width % math.prod(self.strides)

    def channels(self, channels: int) -> int:
        """Channels that share no feature: a block's, or all where each block has its own D."""
        return channels if self.matrices > 1 else self.features // math.prod(self.kernel_size)

    def interleaved(self, channels: int) -> bool:
        """Whether a block's features are not those of neighbouring channels."""
        return self.grouping == "published" and self.matrices == 1 and self.channels(channels) < channels

    def _counts(self, size: Pair) -> Pair:
        left = (size[0] - self.start[0], size[1] - self.start[1])
        return output_size(left, self.kernel_size, self.strides, self.padding, self.dilation)

    def _picked(self, x: Tensor) -> Tensor:
        """The pixels of a grid, a view."""
        return x[:, :, self.start[0] :: self.strides[0], self.start[1] :: self.strides[1]]

    def _grid(self) -> bool:
        """Whether the windows are pixels of the map, all of them at `strides`."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def _of_pixels(self, x: Tensor) -> bool:
        """Whether a patch lies in one piece in x."""
        if torch.compiler.is_compiling() or not self._grid():
            return False
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

    def _inside(self, axis: int, side: int, count: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """For each place in the kernel: which windows have it inside the map, and which pixels of the map those are."""
        step, dilation = self.strides[axis], self.dilation[axis]
        for place in range(self.kernel_size[axis]):
            offset = place * dilation - self.padding[axis] + self.start[axis]
            first = max(0, -(offset // step))  # the first window whose pixel is not in the padding before the map
            last = min(count, (side - 1 - offset) // step + 1)
            if first < last:
                start = first * step + offset
                yield place, (slice(first, last), slice(start, start + (last - first - 1) * step + 1, step))

    def _whole_images(self, x: Tensor) -> bool:
        """Whether a list's pixels are at the same places in each image."""
        return x.shape[2] * x.shape[3] % math.prod(self.strides) == 0

    def _pixels(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if torch.compiler.is_compiling():
            each = x.flatten(2) if self._whole_images(x) else x.transpose(0, 1).flatten(1)[None]
            return each[:, :, :: math.prod(self.strides)]
        if self._channels_last(x):
            return self._listed(x).transpose(1, 2)
        if self._whole_images(x):
            return x.flatten(2)[:, :, :: math.prod(self.strides)]
        if x.device.type == "cpu" and 0 < n <= _FEW_IMAGES:
            return torch.cat([each.flatten(1)[:, taken] for each, taken in zip(x, self._each(x), strict=True)], 1)[None]
        image, row, column = self._places(n, h, w, x.device)
        return x[image, :, row, column].t().unsqueeze(0)

    def _add_pixels(self, x: Tensor, pieces: Tensor) -> None:
        n, c, h, w = x.shape
        if self._channels_last(x):
            self._listed(x).add_(pieces.transpose(1, 2))
        elif x.device.type == "cpu" and 0 < n <= _FEW_IMAGES and not self._whole_images(x) and x[:1].is_contiguous():
            parts = [each.view(c, h * w)[:, taken] for each, taken in zip(x, self._each(x), strict=True)]
            for part, more in zip(parts, pieces[0].split([part.shape[1] for part in parts], 1), strict=True):
                part.add_(more)
        elif not self._whole_images(x):
            image, row, column = self._places(n, h, w, x.device)
            x[image, :, row, column] += pieces[0].t()
        elif x[:1].is_contiguous():
            x.view(n, c, h * w)[:, :, :: math.prod(self.strides)].add_(pieces)
        else:
            _, row, column = self._places(1, h, w, x.device)
            x[:, :, row, column] += pieces

    def _channels_last(self, x: Tensor) -> bool:
        """Whether `_listed` is a view: of each image, or of all of them as one list."""
        return (x[:1] if self._whole_images(x) else x).is_contiguous(memory_format=torch.channels_last)

    def _listed(self, x: Tensor) -> Tensor:
        """The pixels that are taken, as a view (N or 1, pixels, C)."""
        n, c, h, w = x.shape
        every = math.prod(self.strides)
        if self._whole_images(x):
            return x.permute(0, 2, 3, 1).view(n, h * w, c)[:, ::every]
        return x.permute(0, 2, 3, 1).view(1, n * h * w, c)[:, self._first_pixel(h, w) :: every]

    def _each(self, x: Tensor) -> Iterator[slice]:
        """For each image, which ones of its flattened pixels are taken."""
        pixels, every = x.shape[2] * x.shape[3], math.prod(self.strides)
        first = self._first_pixel(x.shape[2], x.shape[3])
        return (slice((first - image * pixels) % every, None, every) for image in range(len(x)))

    def _places(self, images: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        pixels, first = images * height * width, self._first_pixel(height, width)
        index = torch.arange(min(first, pixels), pixels, math.prod(self.strides), device=device)
        place = index % (height * width)
        return index.div(height * width, rounding_mode="floor"), place.div(width, rounding_mode="floor"), place % width


def _every(x: Tensor, step: int) -> Tensor:
    """x (..., n) at every `step`-th place of zeros, (..., n step)."""
    if step == 1:
        return x
    zeros = x.new_zeros(()).expand(*x.shape, step - 1)
    return torch.cat([x.unsqueeze(-1), zeros], -1).flatten(-2)


def _count(to: int, device: torch.device) -> Tensor:
    """0 to `to` - 1; a GPU divides long integers slowly."""
    return torch.arange(to, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Rows:
    """All rows of an input (..., features of several blocks) of a linear layer."""

    features: int

    def gather(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.features).t()

    def rows(self, shape: torch.Size) -> int:
        return math.prod(shape) // self.features

    def scatter_add_(self, x: Tensor, patches: Tensor) -> None:
        x.add_(patches.t().reshape(x.shape).to(x.dtype))

    def spread(self, patches: Tensor, shape: torch.Size) -> Tensor:
        return patches.t().reshape(shape)

    def pieces(self, x: Tensor) -> Tensor:
        return self.gather(x).unsqueeze(0)

    def add_pieces_(self, x: Tensor, pieces: Tensor) -> None:
        self.scatter_add_(x, pieces[0])

    def apart(self, pieces: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return pieces.unsqueeze(0), (0, 1, 3)


def group_patches(patches: Tensor, features: int, matrices: int, grouping: Grouping) -> Tensor:
    """(N, C k_h k_w, rows) -> (F, N C/B rows), or (M, F, N rows) where each of the M blocks has its own D.

    grouping "channel": a block is B neighbouring channels, as in the paper. "published": block j holds the features
    whose channel-major index is j modulo C / B, as the authors' code reshapes them.
    """
    n, total, rows = patches.shape  # n may be 0
    if matrices > 1:
        return patches.reshape(n, matrices, features, rows).permute(1, 2, 0, 3).reshape(matrices, features, -1)
    if grouping == "channel":
        return patches.reshape(n, total // features, features, rows).permute(2, 0, 1, 3).reshape(features, -1)
    return patches.reshape(n, features, total // features, rows).permute(1, 0, 2, 3).reshape(features, -1)


def ungroup_patches(patches: Tensor, images: int, total: int, matrices: int, grouping: Grouping) -> Tensor:
    """The inverse of `group_patches`: to (N, C k_h k_w, rows), where N = `images` and C k_h k_w = `total`."""
    features = patches.shape[-2]
    if matrices > 1:
        return patches.reshape(matrices, features, images, -1).permute(2, 0, 1, 3).reshape(images, total, -1)
    each = patches.reshape(features, images, total // features, -1)
    each = each.permute(1, 2, 0, 3) if grouping == "channel" else each.permute(1, 0, 2, 3)
    return each.reshape(images, total, -1)
