"""A function that the model calls, and what it makes of the result."""

import json
import sys

import mlx_qwen


def calculator(expression: str) -> dict[str, int]:
    left, right = expression.split("*")
    return {"result": int(left) * int(right)}


parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
description = {"name": "calculator", "description": "Multiplies two whole numbers.", "parameters": parameters}
tools = [{"type": "function", "function": description}]

model, processor = mlx_qwen.load(*sys.argv[1:])
messages = [{"role": "user", "content": "How much is 8216*662?"}]
while True:
    *_, last = mlx_qwen.stream_generate(model, processor, messages, tools=tools)
    if not last.tool_calls:
        break
    messages.append({"role": "assistant", "content": last.content, "tool_calls": last.tool_calls})
    for call in last.tool_calls:
        print(f"The model calls {call.name} with {call.arguments}.")
        messages.append({"role": "tool", "content": json.dumps(calculator(**call.arguments))})

print(last.content)
