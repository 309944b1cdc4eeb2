"""Draws scenes: flat shapes on a plain ground."""

import math
import random

from PIL import Image, ImageDraw

from mlx_qwen.demo.tasks.clips import FRAMES_A_STEP
from mlx_qwen.demo.tasks.example import Clip
from mlx_qwen.demo.tasks.scenes import Scene

# Side of a cell as the model sees it: one merged square of patches.
CELL = 32
_RGB = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 90, 225),
    "yellow": (240, 205, 40),
    "purple": (145, 60, 185),
}


def draw_scene(scene: Scene, scale: int = 4, *, drift: float = 0) -> Image.Image:
    """An RGB image of 32 · scale pixels a cell; the same scene is drawn the same at every scale, but for rounding.

    `drift` moves all things to the right by so many 32nds of a cell.
    """
    rng = random.Random(scene.seed)
    side = CELL * scale
    shade = rng.choice((rng.randint(222, 255), rng.randint(0, 45)))
    image = Image.new("RGB", (scene.columns * side, scene.rows * side), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    # Every cell takes its share of chance, so that a thing stays as it is when another comes or goes.
    for row, column in scene.cells():
        radius = rng.uniform(0.3, 0.42) * side
        x, y = (rng.uniform(-1, 1) * (side / 2 - radius - scale) for _ in range(2))
        shift = [rng.randint(-18, 18) for _ in range(3)]
        thing = scene.things.get((row, column))
        if thing is not None:
            centre = ((column + 0.5) * side + x + drift * scale, (row + 0.5) * side + y)
            red, green, blue = (min(255, max(0, c + s)) for c, s in zip(_RGB[thing.colour], shift, strict=True))
            _shape(pen, thing.shape, centre, radius, (red, green, blue))
    return image


def draw_clip(clip: Clip, scale: int = 4) -> list[Image.Image]:
    """The frames of a clip. Those of one step differ a little, as equal ones would become one in an animated file."""
    return [draw_scene(scene, scale, drift=0.5 * i) for scene in clip.scenes for i in range(FRAMES_A_STEP)]


def _shape(
    pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = radius * 0.88
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        low, half = y + radius * 0.75, radius * math.cos(math.pi / 6) * 1.1
        pen.polygon([(x, y - radius), (x + half, low), (x - half, low)], fill=colour)
    else:
        arm = radius * 0.32
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
