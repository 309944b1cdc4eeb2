"""A picture to draw on in points, with smooth edges."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
INK, FAINT, RULE, PAPER = "#1b2733", "#6b7885", "#dde3ea", "#ffffff"

# Pixels a point, of the file and while drawing: shapes are drawn larger, since pillow draws them with hard edges.
_SCALE = 2
_DRAWN = 2 * _SCALE


class Canvas:
    """`width` × `height` points of white; coordinates are points from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _DRAWN, height * _DRAWN), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: Point, text: str, *, size: float = 11, color: str = INK, anchor: str = "lm") -> None:
        """Write one line; `anchor` says which point of it lies at `at`, in pillow's two letters."""
        self._draw.text(_scaled(at), text, fill=color, font=_font(size), anchor=anchor)

    def width_of(self, text: str, size: float) -> float:
        """How many points wide a line of text is."""
        return float(_font(size).getlength(text)) / _DRAWN

    def box(self, upper_left: Point, size: Point, color: str, *, radius: float = 0) -> None:
        """Fill a rectangle of `size` points."""
        (x, y), (width, height) = _scaled(upper_left), _scaled(size)
        corners = (x, y, x + max(width - 1, 0), y + max(height - 1, 0))
        self._draw.rounded_rectangle(corners, radius=radius * _DRAWN, fill=color)

    def line(self, points: Sequence[Point], color: str, *, width: float = 1) -> None:
        """Draw through `points`."""
        self._draw.line([_scaled(point) for point in points], fill=color, width=round(width * _DRAWN), joint="curve")

    def area(self, points: Sequence[Point], color: str) -> None:
        """Fill the polygon of `points`."""
        self._draw.polygon([_scaled(point) for point in points], fill=color)

    def dot(self, centre: Point, radius: float, color: str) -> None:
        """Fill a circle."""
        (x, y), r = _scaled(centre), radius * _DRAWN
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def save(self, path: Path) -> None:
        """Write the picture; the ending of `path` says the format."""
        self._image.reduce(_DRAWN // _SCALE).save(path)


def blend(start: str, end: str, share: float) -> str:
    """The colour `share` of the way from one `#rrggbb` to the other."""
    pairs = zip(bytes.fromhex(start[1:]), bytes.fromhex(end[1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * share) for a, b in pairs).hex()


def _scaled(point: Point) -> Point:
    return point[0] * _DRAWN, point[1] * _DRAWN


@cache
def _font(size: float) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    return ImageFont.load_default(size * _DRAWN)
