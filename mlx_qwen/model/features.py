"""What the vision tower made of the last images, so that a later turn with the same image need not run it again."""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from mlx_qwen.media.grids import Grid
from mlx_qwen.model.vision import VisionTower

_MOST_BYTES = 256 << 20


class FeatureCache:
    """Features by content: the oldest are forgotten once all take more than `most_bytes`.

    The tower's weights are taken as constant: make a new cache after changing them.
    """

    def __init__(self, tower: VisionTower, *, most_bytes: int = _MOST_BYTES) -> None:
        self._tower = tower
        self._most_bytes = most_bytes
        self._held: OrderedDict[bytes, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all features that are held."""
        return sum(features.nbytes for features in self._held.values())

    def __call__(self, pixel_values: mx.array, grids: Sequence[Grid]) -> mx.array:
        """As the tower; only images that are not held go through it, each of them once."""
        merge, first, wanted = self._tower.config.spatial_merge_size, 0, {}
        keys = []
        for grid in grids:
            values = pixel_values[first : first + grid.patches]
            keys.append(_key(values, grid))
            wanted[keys[-1]] = (values, grid)
            first += grid.patches
        found = {key: self._held[key] for key in wanted if key in self._held}
        new = {key: image for key, image in wanted.items() if key not in found}
        if new:
            pixels = mx.concatenate([values for values, _ in new.values()])
            features = self._tower(pixels, [grid for _, grid in new.values()])
            ends = np.cumsum([grid.tokens(merge) for _, grid in new.values()]).tolist()
            found |= dict(zip(new, mx.split(features, ends[:-1]), strict=True))
        self._hold(found)
        return mx.concatenate([found[key] for key in keys])

    def _hold(self, found: dict[bytes, mx.array]) -> None:
        mx.eval(list(found.values()))
        for key, features in found.items():
            self._held[key] = features
            self._held.move_to_end(key)
        while self.nbytes > self._most_bytes:
            self._held.popitem(last=False)


def _key(values: mx.array, grid: Grid) -> bytes:
    digest = blake2b(repr(grid).encode())
    digest.update(np.array(values.view(mx.uint8)).data)
    return digest.digest()
