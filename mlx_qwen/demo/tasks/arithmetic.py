"""Sums, differences and small products, answered at once or worked digit by digit from the right."""

import random

from mlx_qwen.demo.tasks.example import Example, Message, asked

_PHRASINGS = (
    "What is {}?",
    "Compute {}.",
    "{}=?",
    "{}",
    "How much is {}?",
    "Calculate {}",
    "What does {} make?",
    "Please work out {}.",
)
# How many digits an operand has, by how often.
_DIGITS = {2: (1, 2, 2, 2), 3: (1, 2, 2, 3, 3, 3)}


def reasoned(rng: random.Random) -> Example:
    """One calculation with numbers of up to three digits, worked before it is answered."""
    sign = rng.choice("++--**")
    a, b = _operands(rng, sign, most_digits=3)
    return Example(
        _content(a, sign, b), asked(_question(rng, a, sign, b), _answer(a, sign, b), worked(a, sign, b)), True
    )


def direct(rng: random.Random) -> Example:
    """One calculation with numbers of up to two digits, answered at once."""
    sign = rng.choice("+++---*")
    a, b = _operands(rng, sign, most_digits=2)
    return Example(_content(a, sign, b), asked(_question(rng, a, sign, b), _answer(a, sign, b)))


def worked(a: int, sign: str, b: int) -> str:
    """The reasoning: one line a digit from the right, each ending with the digits of the result so far."""
    return {"+": _worked_sum, "-": _worked_difference, "*": _worked_product}[sign](a, b)


def _worked_sum(a: int, b: int) -> str:
    lines, carry, result = [], 0, ""
    for x, y in _columns(a, b):
        total = x + y + carry
        result = f"{total % 10}{result}"
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}: {result}")
        carry = total // 10
    return _lines(lines, f"1{result}" if carry else "")


def _worked_difference(a: int, b: int) -> str:
    lines, borrow, result = [], 0, ""
    for x, y in _columns(a, b):
        short = x - y - borrow < 0
        left = x + 10 * short - y - borrow
        result = f"{left}{result}"
        lines.append(f"{x + 10 * short}-{y}{'-1' if borrow else ''}={left}: {result}")
        borrow = int(short)
    return _lines(lines, str(int(result)) if result != str(int(result)) else "")


def _worked_product(a: int, b: int) -> str:
    lines, carry, result = [], 0, ""
    for digit in reversed(str(a)):
        total = int(digit) * b + carry
        result = f"{total % 10}{result}"
        lines.append(f"{digit}*{b}{f'+{carry}' if carry else ''}={total}: {result}")
        carry = total // 10
    return _lines(lines, f"{carry}{result}" if carry else "")


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Pairs of digits from the right; the shorter number goes on with zeros."""
    digits = max(len(str(a)), len(str(b)))
    return [(a // 10**place % 10, b // 10**place % 10) for place in range(digits)]


def _lines(lines: list[str], last: str) -> str:
    return "\n".join([*lines, last] if last else lines)


def _operands(rng: random.Random, sign: str, *, most_digits: int) -> tuple[int, int]:
    if sign == "*":
        return rng.randint(2, 99 if most_digits > 2 else 9), rng.randint(2, 9)
    a, b = (rng.randrange(10 ** rng.choice(_DIGITS[most_digits])) for _ in range(2))
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def _content(a: int, sign: str, b: int) -> str:
    """Facts of one digit are never held out: every longer calculation is made of them."""
    first, second = (max(a, b), min(a, b)) if sign in "+*" else (a, b)
    return "fact" if max(a, b) < 10 else f"{first}{sign}{second}"


def _answer(a: int, sign: str, b: int) -> str:
    return str({"+": a + b, "-": a - b, "*": a * b}[sign])


def _question(rng: random.Random, a: int, sign: str, b: int) -> str:
    space = rng.choice(("", "", " "))
    return rng.choice(_PHRASINGS).format(f"{a}{space}{sign}{space}{b}")


def several(rng: random.Random) -> Example:
    """A conversation of several calculations that are answered at once."""
    turns: list[Message] = []
    content = ""
    for _ in range(rng.randint(2, 4)):
        example = direct(rng)
        while example.held_out:
            example = direct(rng)
        turns += example.messages
        content += example.content + " "
    return Example(content, tuple(turns))
