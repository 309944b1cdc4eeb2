"""The words that the tasks share: few enough for a small vocabulary, enough for held-out combinations."""


def words(text: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(text.split())


NAMES = words(
    "Ada Ben Cora Dan Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina Vera Will Zoe Amy Bob "
    "Carl Emil Greta Hans Kate Lena Max Nora Oscar Ruth Tom"
)
CITIES = words("Paris Rome Berlin London Madrid Oslo Vienna Tokyo Cairo Lima Delhi Boston Dublin Athens Prague Milan")
THINGS = words("apples books cards coins eggs keys nuts pens plums shells stamps stones")
ANIMALS = words("cat dog fox hen horse mouse owl bear frog goat")
COLOURS = words("red green blue yellow purple")
SHAPES = words("circle square triangle cross")
