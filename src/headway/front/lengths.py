"""Decides how many tokens a prompt has: as its ids or a tokenizer count them, else by an estimate.

Without a tokenizer the estimate is learned from the `usage` that engines report, for each model and kind of
request by itself: chat templates differ. An estimate steers where requests go and never refuses one: only
the engine knows.
"""

from collections import OrderedDict

from headway.core.estimate.prompt_length import PromptLength
from headway.front.requests import Call

__all__ = ["Lengths"]

#: Models are named by clients; of more than these, the one that was used longest ago is forgotten.
MOST_ESTIMATORS = 64
#: An image in tokens, before any was seen; and the weight of what is known when a new one is.
TOKENS_OF_OTHER_PART, OTHER_DECAY = 512.0, 0.9
#: No image has more tokens than this.
MOST_OF_OTHER_PART = 100_000.0


class Lengths:
    """Measures prompts and learns from what engines count."""

    def __init__(self) -> None:
        self._estimators: OrderedDict[tuple[str | None, bool], PromptLength] = OrderedDict()
        self._other_part = TOKENS_OF_OTHER_PART
        self._error = 0.0

    @property
    def error(self) -> float:
        """Mean relative error of recent estimates, of the estimator that learned last; 0 before any did."""
        return self._error

    def exact(self, call: Call) -> bool:
        """Whether the length of a prompt is counted, so that it may refuse the request."""
        counted = call.token_ids is not None or call.counted is not None
        return counted and not call.other_parts and not call.truncates

    def measure(self, call: Call) -> int:
        """Return the (likely) tokens of a prompt, at least 1."""
        if call.token_ids is not None:
            tokens = call.token_ids
        elif call.counted is not None:
            tokens = call.counted
        else:
            tokens = self._estimator(call).estimate(call.text_bytes)
        return max(1, tokens + round(call.other_parts * self._other_part))

    def learn(self, call: Call, prompt_tokens: int) -> None:
        """Learn from what an engine counted. Nothing is learned of a prompt that came as ids."""
        if call.token_ids is not None or call.truncates or call.sequences > 1:
            return
        estimator = self._estimator(call)
        if not call.other_parts:
            estimator.observe(call.text_bytes, prompt_tokens)
            self._error = self._error if estimator.error is None else estimator.error
            return
        of_one = (prompt_tokens - estimator.estimate(call.text_bytes)) / call.other_parts
        if 0.0 <= of_one <= MOST_OF_OTHER_PART:
            self._other_part = OTHER_DECAY * self._other_part + (1.0 - OTHER_DECAY) * of_one

    def _estimator(self, call: Call) -> PromptLength:
        key = (call.model, call.messages > 0)
        found = self._estimators.get(key)
        if found is None:
            found = self._estimators[key] = PromptLength()
            if len(self._estimators) > MOST_ESTIMATORS:
                self._estimators.popitem(last=False)
        self._estimators.move_to_end(key)
        return found
