"""A cache of image features from the vision tower that later samples of a run may need again."""

from collections import OrderedDict
from collections.abc import Mapping

import torch


class FeatureCache:
    """The most recently computed image features, up to a number of bytes.

    Images that passed the tower together are parts of one tensor, so they are kept and dropped together: to
    copy each one would take a kernel per image.
    """

    def __init__(self, max_bytes: int) -> None:
        self._chunks: OrderedDict[int, Mapping[str, torch.Tensor]] = OrderedDict()
        self._chunk_of: dict[str, int] = {}
        self._next, self._bytes, self._max_bytes = 0, 0, max_bytes

    def __len__(self) -> int:
        """The number of images whose features are kept."""
        return len(self._chunk_of)

    def get(self, key: str) -> torch.Tensor | None:
        """The features of an image, if they are still there."""
        number = self._chunk_of.get(key)
        if number is None:
            return None
        self._chunks.move_to_end(number)
        return self._chunks[number][key]

    def put(self, chunk: Mapping[str, torch.Tensor]) -> None:
        """Keep the features of images that passed the tower together, which are parts of one tensor."""
        self._chunks[self._next] = chunk
        self._chunk_of.update(dict.fromkeys(chunk, self._next))
        self._next += 1
        self._bytes += _storage(chunk)
        while self._bytes > self._max_bytes:
            _, dropped = self._chunks.popitem(last=False)
            self._bytes -= _storage(dropped)
            for name in dropped:
                del self._chunk_of[name]

    def clear(self) -> None:
        """Drop everything."""
        self._chunks.clear()
        self._chunk_of.clear()
        self._bytes = 0


def _storage(chunk: Mapping[str, torch.Tensor]) -> int:
    """The number of bytes of all tensors that contain features of the chunk's images."""
    storages = (part.untyped_storage() for part in chunk.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
