"""The errors a user can meet. Each message says what was expected, what was found and what to do next."""


class MLXQwenError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(MLXQwenError, ValueError):
    """A `config.json` that is missing, unreadable, of another family or impossible."""


class CheckpointError(MLXQwenError, ValueError):
    """A checkpoint whose files or tensors are missing, truncated, misshapen or implausible."""


class PromptError(MLXQwenError, ValueError):
    """A prompt, message list or generation option that cannot be used."""


class ConversionError(MLXQwenError, RuntimeError):
    """A conversion that cannot start or finish; no output was left under the final name."""


class ShardingError(MLXQwenError, ValueError):
    """A number of ranks that a model cannot be divided among."""


class PlanningError(MLXQwenError, ValueError):
    """A model, precision, context, chip or memory size that cannot be planned for."""


class RanksEndedError(MLXQwenError, RuntimeError):
    """All ranks end. The process says why by itself: whoever gets this tells those who wait for him, and lets go."""
