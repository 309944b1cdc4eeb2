"""An answer as it is written, its reasoning apart, and how fast it went."""

import sys

import mlx_qwen

model, processor = mlx_qwen.load(*sys.argv[1:])
messages = [{"role": "user", "content": "What is 358+67?"}]

for response in mlx_qwen.stream_generate(model, processor, messages, enable_thinking=True, max_tokens=512):
    print(response.text, end="", flush=True)

print(f"\n\nIt thought:\n{response.reasoning}")
print(f"and ended by {response.finish_reason}.\n{response.statistics()}")
