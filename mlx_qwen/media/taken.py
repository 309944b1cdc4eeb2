"""A frame that was taken of a video."""

from typing import NamedTuple

from PIL import Image


class Taken(NamedTuple):
    """A frame as upright RGB, and the seconds at which it is shown, None where only the rate tells."""

    image: Image.Image
    seconds: float | None
