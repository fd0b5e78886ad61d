"""What a language model loses by a task: the cross-entropy of general text with the task's update, minus without it.

0: what the model knew of other texts is untouched; 0.1: a token of general text has become 10 % less likely, in the
geometric mean. Measured on the same tokens with and without the update, so that the difference is known much better
than either.

Source: PEFT's public comparison of methods on MetaMathQA calls the same difference forgetting.

Axes: T tokens, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from weakref import WeakKeyDictionary

import torch

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from workers.base_model import BaseModel
from workers.deepspeed_engine import is_parted, parted
from workers.evaluation import adapted_model

TOKENS = 4096
"""As many tokens of the text are read, or all where it has fewer."""
WINDOW = 512
"""Tokens that a model is given at once, the base model's own limit permitting."""

_of_base: MutableMapping[BaseModel, dict[str, float]] = WeakKeyDictionary()
"""Text to the cross-entropy of the base model alone: it is the same for all tasks and versions."""


def general_loss(
    base: BaseModel, adapter: Adapter, spec: TaskSpec, text: str, between_windows: Callable[[], None]
) -> float:
    """What is lost of a text, in nats for each token; below 0 where the task has made it likelier.

    Args:
        spec: Of kind `causal_lm`.
        between_windows: May raise to stop.

    Raises:
        InvalidInput: The tokenizer makes hardly a token of the text, or the model puts out what is no number.

    Cost:
        A forward pass over `TOKENS` tokens; the first time in a process, and for another text, two.
    """
    known = _of_base.setdefault(base, {})
    if text not in known or is_parted(spec):  # ranks that know different things would wait for each other
        known[text] = _cross_entropy(base, adapter, spec, text, between_windows, with_update=False)
    return _cross_entropy(base, adapter, spec, text, between_windows, with_update=True) - known[text]


def _cross_entropy(
    base: BaseModel, adapter: Adapter, spec: TaskSpec, text: str, between: Callable[[], None], with_update: bool
) -> float:
    ids_T = base.tokenizer(text, add_special_tokens=False, truncation=True, max_length=TOKENS)["input_ids"]
    if len(ids_T) < 2:
        what = f"the tokenizer of {base.name} makes {len(ids_T)} tokens of it"
        raise InvalidInput(what, "base_model.general_text", "name a text in a script that it knows")
    # A model that was trained with a token before every text has never seen one without.
    begins = [base.tokenizer.bos_token_id] if base.tokenizer("a")["input_ids"][0] == base.tokenizer.bos_token_id else []
    size, lost, count = min(WINDOW, base.length_max) - len(begins), 0.0, 0
    with parted(adapted_model(base, adapter, spec, with_update), spec.training.deepspeed) as model:
        model.eval()
        for start in range(0, len(ids_T) - 1, size):
            between()
            window = torch.tensor([begins + ids_T[start : start + size]], device=model.device)
            if window.shape[1] < 2:
                break  # one token by itself is predicted from nothing
            with torch.inference_mode():
                logits_TV = model(input_ids=window, attention_mask=torch.ones_like(window)).logits[0, :-1]
                of_window = torch.nn.functional.cross_entropy(logits_TV.float(), window[0, 1:], reduction="none")
            lost, count = lost + float(of_window.double().sum()), count + len(of_window)
    if not math.isfinite(lost):
        raise InvalidInput(
            "the model's output for general text is no number", "training.learning_rate", "lower it and submit again"
        )
    return lost / count
