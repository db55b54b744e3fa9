"""How much the labels of a video flicker.

The flicker of a video is the share of pixels whose label is another one than in the frame before, over all pairs of
neighbouring frames. Moving things change labels too, so that a second share looks only where the image itself hardly
changes: what flickers there is the network. Pairs across a scene cut are left out of both.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint8]

STILL = 8
"""Levels (of 255) by which a channel of a still pixel may differ from the frame before (noise, compression)."""
CUT = 30
"""A mean difference of more grey levels (of 255) between the thumbnails of two frames is a scene cut."""
_THUMBNAIL = (64, 36)


class Motion:
    """Compares each frame with the one before.

    Attributes:
        cuts: scene cuts so far.
    """

    def __init__(self) -> None:
        self.cuts = 0
        self._before: tuple[Array, Array] | None = None

    def update(self, image: Array) -> Array | None:
        """Take the next frame, uint8 (H, W, 3).

        Returns:
            255 where the image hardly changes and 0 elsewhere, uint8 (H, W); None for the first frame of a scene.
        """
        thumbnail = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _THUMBNAIL, interpolation=cv2.INTER_AREA)
        before, self._before = self._before, (image, np.asarray(thumbnail, np.uint8))
        if before is None:
            return None
        if cv2.absdiff(before[1], thumbnail).mean() > CUT:
            self.cuts += 1
            return None
        still = cv2.inRange(cv2.absdiff(before[0], image), (0, 0, 0), (STILL, STILL, STILL))
        return np.asarray(still, np.uint8)


class Flicker:
    """Counts pixels with another label than in the frame before."""

    def __init__(self) -> None:
        self._before: Array | None = None
        self._changed = self._pixels = self._still_changed = self._still = 0

    def update(self, ids: Array, still: Array | None) -> None:
        """Take the next frame's labels, uint8 (H, W), and what `Motion.update` says of its image."""
        before, self._before = self._before, ids
        if before is None or still is None:
            return
        changed = cv2.compare(before, ids, cv2.CMP_NE)
        self._changed += cv2.countNonZero(changed)
        self._pixels += ids.size
        self._still_changed += cv2.countNonZero(cv2.bitwise_and(changed, still))
        self._still += cv2.countNonZero(still)

    @property
    def share(self) -> float:
        """Of all pixels, 0 to 1; nan without two neighbouring frames."""
        return self._changed / self._pixels if self._pixels else math.nan

    @property
    def still_share(self) -> float:
        """Of the still pixels, 0 to 1; nan if there are none."""
        return self._still_changed / self._still if self._still else math.nan
