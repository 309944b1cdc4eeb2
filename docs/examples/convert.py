"""A conversion to fewer bits, and what it cost."""

import sys
import tempfile
from pathlib import Path

import mlx_qwen
from mlx_qwen.convert import compare, convert
from mlx_qwen.demo import demo_folder

source = sys.argv[1] if len(sys.argv) > 1 else demo_folder()
text = "Once there was a fox named Hans. Hans had three blue books. One day Hans went to the town. " * 8

with tempfile.TemporaryDirectory() as folder:
    for bits in (8, 4):
        target = Path(folder) / f"{bits}bit"
        report = convert(source, target, bits=bits)
        lost = compare(source, target, text=text)
        print(
            f"{bits} bits: {report.output_bytes / 1e6:,.1f} MB, {report.bits_per_weight:.1f} bits a weight with all "
            f"that stays unpacked; the likeliest token is the same {lost.agreement:.1%} of the time"
        )
    model, processor = mlx_qwen.load(target)
    question = [{"role": "user", "content": "What is 37+58?"}]
    print("With 4 bits, 37+58 is", mlx_qwen.generate(model, processor, question, max_tokens=32))
