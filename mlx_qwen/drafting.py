"""Who guesses tokens ahead, as a caller chose it, and how well that went."""

from pathlib import Path

from mlx_qwen.answer.response import Drafting
from mlx_qwen.engine.depth import DRAFT_COST, Drafts, acceptance, stated_costs
from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.engine.lookup import Lookup
from mlx_qwen.engine.memory import DRAFT_SHARE
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.vocabulary import DraftVocabulary, special_run
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from mlx_qwen.settings import EngineSettings
from mlx_qwen.value_types import shown


def drafts_of(settings: EngineSettings, sampler: TokenSampler) -> Drafts:
    """How many tokens the MTP layer or a draft model guesses: as was measured where no answer has to come again."""
    return _drafts(settings.drafts, sampler, DRAFT_COST)


def vocabulary_of(settings: EngineSettings, processor: Processor, vocab_size: int) -> DraftVocabulary | None:
    """Which tokens guesses are chosen from; None for all of them."""
    if settings.draft_vocabulary == 0:
        return None
    special = special_run(processor.tokenizer.get_added_tokens_decoder().keys())
    return DraftVocabulary(vocab_size, special, settings.draft_vocabulary)


def lookup_of(settings: EngineSettings, sampler: TokenSampler) -> Lookup | None:
    """The copies of one answer, if they are wanted; they cost nothing to make."""
    return Lookup(_drafts(settings.num_draft_tokens, sampler, 0)) if settings.prompt_lookup else None


def drafting_of(sequence: Sequence, written: int) -> Drafting | None:
    """How drafting went in a whole answer of `written` tokens; None where nothing was guessed."""
    several = [sequence.drafts] + ([sequence.lookup.drafts] if sequence.lookup else [])
    accepted = acceptance(*several)
    right = sum(sum(one.all_taken) for one in several)
    return Drafting(tuple(accepted), written / max(1, written - right)) if accepted else None


def draft_model_of(model: Model, processor: Processor, asked: object) -> DraftModel | None:
    """The draft model that `draft_model=` means: a path or repository, or a loaded model; None for None.

    The model's engine keeps the last one, with what it has read. Raises PromptError where it is none or has another
    vocabulary, and as `load` does.
    """
    if asked is None:
        return None
    engine, named = engine_of(model), str(asked) if isinstance(asked, str | Path) else asked
    kept = engine.draft_model
    if kept is not None and (kept[0] is named or (isinstance(named, str) and kept[0] == named)):
        return kept[1]
    if isinstance(named, str):
        drafting, own = load(named)
        _check_tokens(processor, own, named)
    elif isinstance(named, Model):
        drafting = named
    else:
        raise PromptError(
            f"draft_model is {shown(asked)}; expected a path or repository of a smaller model, or one from load, or "
            "None."
        )
    found, expected = drafting.config.text.vocab_size, model.config.text.vocab_size
    if found != expected:
        raise PromptError(
            f"draft_model {shown(named)} has a vocabulary of {found:,} tokens, expected the model's {expected:,}: "
            "use a smaller model of the same generation."
        )
    drafting.materialize(vision=False)
    engine.memory.make_room_beside(drafting)
    budget = 0 if engine.prefixes is None else engine.prefixes.budget_bytes // DRAFT_SHARE
    made = DraftModel(drafting, PrefixIndex(budget), engine.memory.piece_bytes)
    engine.draft_model = (named, made)
    return made


def _check_tokens(processor: Processor, own: Processor, name: str) -> None:
    """Raises PromptError unless both tokenizers know the same tokens."""
    expected, found = (each.tokenizer.get_vocab() for each in (processor, own))
    if found == expected:
        return
    words = {token: word for word, token in found.items()}
    other = min((token for word, token in expected.items() if words.get(token) != word), default=len(expected))
    expected_words = {token: word for word, token in expected.items()}
    raise PromptError(
        f"draft_model {name!r} has another vocabulary: its token {other} is {words.get(other)!r}, expected "
        f"{expected_words.get(other)!r} as of the model. Use a smaller model of the same generation."
    )


def _drafts(fixed: int | None, sampler: TokenSampler, cost: float) -> Drafts:
    return Drafts(fixed, stated_costs(cost), is_measured=fixed is None and not sampler.is_repeatable)
