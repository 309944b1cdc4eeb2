"""Questions about a picture that is drawn on the spot."""

import sys

from PIL import Image, ImageDraw

import mlx_qwen

picture = Image.new("RGB", (384, 256), "white")
pen = ImageDraw.Draw(picture)
pen.ellipse((20, 20, 110, 110), fill="red")
pen.rectangle((150, 150, 230, 230), fill="blue")
pen.polygon([(320, 24), (368, 104), (272, 104)], fill="green")

model, processor = mlx_qwen.load(*sys.argv[1:])
for question in ("What do you see?", "How many things are there?", "Where is the blue square?"):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    answer = mlx_qwen.generate(model, processor, [{"role": "user", "content": content}], max_tokens=64)
    print(f"{question}\n  " + answer.replace("\n", "\n  "))
