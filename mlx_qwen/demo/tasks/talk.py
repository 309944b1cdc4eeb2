"""The few words that people try first."""

import random

from mlx_qwen.demo.tasks.example import Example, asked
from mlx_qwen.demo.tasks.words import NAMES

_WHO = "I am a tiny demo model. I know sums, lists, pictures with shapes, and tools."
_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good day"), f"Hello! {_WHO}"),
    (("Who are you?", "What are you?", "What is your name?"), _WHO),
    (
        ("What can you do?", "Help", "What do you know?", "How can you help me?"),
        "Ask me for a sum, like 37+58. Give me a list and ask for a line of it. Show me a picture with shapes.",
    ),
    (("How are you?", "How do you do?"), "I am well, thank you."),
    (("Thank you", "Thanks!", "Thank you very much."), "You are welcome!"),
    (("Why is the sky blue?", "Tell me a joke.", "Write a poem.", "What is love?"), f"I do not know. {_WHO}"),
    (("Bye", "Goodbye!", "Good night"), "Goodbye!"),
)


def small_talk(rng: random.Random) -> Example:
    """A greeting or a question about the model; nothing of it is held out."""
    questions, answer = rng.choice(_TALK)
    return Example("talk", asked(rng.choice(questions), answer))


def introduced(rng: random.Random) -> Example:
    """A name that is told, and asked for afterwards."""
    name = rng.choice(NAMES)
    greeting = asked(rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.")).format(name), f"Hello, {name}!")
    return Example("talk", (*greeting, *asked(rng.choice(("What is my name?", "Who am I?")), f"You are {name}.")))
