"""How good a conversion is: two checkpoints compared by what they predict and by what they hold."""

from .card import PLOT_NAME, check_verifiable, section, verify_conversion
from .destination import check_destination
from .plot import check_plot, save_plot
from .result import Comparison
from .run import compare
from .source import open_decoded
from .tensors import TensorError
from .texts import evaluation_text

__all__ = [
    "PLOT_NAME",
    "Comparison",
    "TensorError",
    "check_destination",
    "check_plot",
    "check_verifiable",
    "compare",
    "evaluation_text",
    "open_decoded",
    "save_plot",
    "section",
    "verify_conversion",
]
