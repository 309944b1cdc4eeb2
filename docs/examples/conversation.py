"""Turns that build on each other."""

import sys

import mlx_qwen

model, processor = mlx_qwen.load(*sys.argv[1:])
conversation = mlx_qwen.Conversation(model, processor, max_tokens=64)

for question in ("Here is a note.\nAda: 41\nBen: 87\nCora: 53\n\nWhat number has Ben?", "What number has Cora?"):
    turn = conversation.ask(question)
    answer = "".join(response.text for response in turn)
    conversation.remember(turn)
    print(f"You:   {question.splitlines()[-1]}\nModel: {answer}\n")
