"""Turns that build on each other."""

import sys

import mlx_qwen
from mlx_qwen.conversation import Conversation
from mlx_qwen.options import GenerationOptions

model, processor = mlx_qwen.load(*sys.argv[1:])
conversation = Conversation(model, processor, GenerationOptions(max_tokens=64))

for question in ("Here is a note.\nAda: 41\nBen: 87\nCora: 53\n\nWhat number has Ben?", "What number has Cora?"):
    turn = conversation.ask(question)
    answer = "".join(response.text for response in turn)
    conversation.remember(turn)
    print(f"You:   {question.splitlines()[-1]}\nModel: {answer}\n")
