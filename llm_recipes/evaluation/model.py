"""A causal language model that scores and continues token ids, fast on many of them.

What makes it fast: contexts that begin alike are computed once, choices share the context of their question, a finished
answer's place in the batch goes to the next prompt, and logits are computed only where they are read. With
`max_batch_tokens: 1` each sequence goes through the model alone and whole, which gives lm-eval's numbers to the bit.

Answers do not go through transformers' `generate_batch`: its batches follow a thread's timing, so that two runs may differ in
the last bits, it knows no stop strings, and on the CPU it took 1.4 times as long (docs/evaluation.md).
"""

import copy
import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

from llm_recipes._compat import state_digest
from llm_recipes.answers import draw, generate
from llm_recipes.errors import RecipeExit, UserError
from llm_recipes.models import stop_ids

WORTH_SHARING = 64  # tokens saved, below which another forward costs more than it spares
ROWS = 32  # answers written at a time, at most
ALIKE = 0.75  # of the longest of a batch of continuations: shorter ones go into the next, for less padding


class Sampling(NamedTuple):
    """How tokens are chosen: greedy at temperature 0, else from the `top_p` most likely mass (Holtzman et al. 2020)."""

    temperature: float = 0.0
    top_p: float = 1.0


class Model:
    """Raises UserError for a model that is not causal, RecipeExit where it returns something that is not a number."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_batch_tokens: int):
        self.model, self.tokenizer, self.max_batch_tokens = model.eval(), tokenizer, max_batch_tokens
        self.context = getattr(model.config, "max_position_embeddings", None) or 2048  # lm-eval's default too
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = {*stop_ids(model), *eos}
        self.prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if self.keeps_logits else {}
        self.fingerprint = state_digest(model)  # of the weights as they are used
        self._check_causal()
        self.shares = self._can_share()

    @torch.no_grad()
    def _check_causal(self) -> None:
        """An encoder such as BERT loads as a causal model too, and then sees what it is to predict."""
        one, other = self.model(torch.tensor([[0, 1], [0, 2]], device=self.model.device)).logits[:, 0].float()
        if not torch.allclose(one, other, rtol=0.05, atol=0.05, equal_nan=True):
            raise UserError("model: it reads the tokens after the one it is to predict: it is no causal language model")

    # ---- text to ids ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does by default; a text that begins with the BOS gets no second one."""
        begun = self.prefix_id is not None and text.startswith(self.tokenizer.decode(self.prefix_id))
        return self.tokenizer.encode(text, add_special_tokens=False) if begun else self.tokenizer.encode(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the continuation); white space at the seam belongs to the continuation."""
        bare = context.rstrip()
        if not bare:
            return [self.prefix_id], self.tokenizer.encode(context + continuation, add_special_tokens=False)
        ids = self.encode(bare)
        return ids, self.encode(context + continuation)[len(ids) :]

    # ---- log-likelihoods -----------------------------------------------------------------------------

    @torch.no_grad()
    def loglikelihoods(self, requests: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """For each (context, continuations) the log-probability of every continuation, in nats.

        What does not fit into the model's context is cut on the left.
        """
        longest = max(len(context) + max(map(len, conts)) for context, conts in requests)
        if self.max_batch_tokens == 1 or not self.shares or longest > self.context + 1:
            pairs = [(context, cont) for context, conts in requests for cont in conts]
            found = iter(self._whole(pairs))
            return [[next(found) for _ in conts] for _, conts in requests]
        contexts = [context for context, _ in requests]
        cache, mask, logits = self._prefill(contexts, *self._prefix(contexts))
        logprobs = _finite(logits.float().log_softmax(-1))
        sums = [[float(logprobs[i, cont[0]]) for cont in conts] for i, (_, conts) in enumerate(requests)]
        rest = [(i, j) for i, (_, conts) in enumerate(requests) for j, cont in enumerate(conts) if len(cont) > 1]
        rest.sort(key=lambda place: -len(requests[place[0]][1][place[1]]))
        while rest:
            lengths = [len(requests[i][1][j]) for i, j in rest]
            size = sum(length >= ALIKE * lengths[0] for length in lengths)
            part, rest = rest[:size], rest[size:]
            more = self._continue(_again(cache), mask, [i for i, _ in part], [requests[i][1][j] for i, j in part])
            for (i, j), nats in zip(part, more, strict=True):
                sums[i][j] += nats
        return sums

    def _continue(self, cache, mask, rows: list[int], conts: list[list[int]]) -> list[float]:
        """Log-probabilities of all but the first token of `conts`, each after a row of the cache, which is used up."""
        width = max(map(len, conts)) - 1
        ids, own = self._padded([cont[:-1] for cont in conts], width, left=False)
        index = torch.tensor(rows, device=mask.device)
        cache.batch_select_indices(index)
        mask = torch.cat([mask[index], own], 1)
        positions = (mask.cumsum(1) - 1)[:, -width:].clamp(min=0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        targets, _ = self._padded([cont[1:] for cont in conts], width, left=False)
        logprobs = out.logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        return _finite((logprobs.double() * own).sum(1)).tolist()

    def _whole(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """Log-probabilities of continuations, each sequence whole and padded on the right; lm-eval's way.

        Continuations that differ in their last token alone, such as letters, are one sequence.
        """
        sequences: dict[tuple[int, ...], list[int]] = {}
        for i, (context, cont) in enumerate(pairs):
            sequences.setdefault(tuple((context + cont)[-(self.context + 1) :][:-1]), []).append(i)
        found, order = [0.0] * len(pairs), sorted(sequences, key=len, reverse=True)
        while order:
            size = max(1, self.max_batch_tokens // len(order[0]))
            inputs, order = order[:size], order[size:]
            ids, _ = self._padded([list(each) for each in inputs], len(inputs[0]), left=False)
            first = min(len(each) - len(pairs[i][1]) for each in inputs for i in sequences[each])
            logprobs = self._logits(ids, first).float().log_softmax(-1)
            for row, each in enumerate(inputs):
                for i in sequences[each]:
                    targets = torch.tensor(pairs[i][1], device=ids.device)
                    end = len(each) - first
                    chosen = logprobs[row, end - len(targets) : end].gather(1, targets[:, None])[:, 0]
                    found[i] = _finite(chosen.sum()).item()
        return found

    def _logits(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Logits `(B, T - first, V)` of the positions from `first` on; a product of other shape rounds otherwise, so where
        each sequence is alone all are computed.
        """
        if not self.keeps_logits or self.max_batch_tokens == 1:
            return self.model(ids).logits[:, first:]
        keep = torch.arange(first, ids.shape[1], device=ids.device)
        return self.model(ids, use_cache=False, logits_to_keep=keep).logits

    # ---- generation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], stop: Sequence[str], max_new_tokens: int, sampling: Sampling = Sampling(),  # noqa: B008
        uniforms: Callable[[int], torch.Tensor] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Completions of token-id prompts, up to and with the token that ends the turn or completes a stop string.

        A stop string that is a special token stops as a token: it is not in the text. Prompts may be repeated: each is
        read once. To sample, `uniforms(i)` gives the `max_new_tokens` random numbers of prompt `i`; then an answer depends
        on its own numbers, not on what stands beside it.
        """
        if not self.shares:
            return self._library(prompts, stop, max_new_tokens, sampling, uniforms)
        ends = self.ends(stop)
        prefix = self._prefix(prompts)
        written, queue = (
            [[] for _ in prompts],
            sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i])),
        )
        tail = 8 + max((len(text.encode()) for text in stop), default=0)  # a token holds a byte or more
        numbers = {}
        slots = self.rows(max(map(len, prompts)), max_new_tokens)
        rows, cache, mask = [], None, None
        while rows or queue:
            if queue and (not rows or slots - len(rows) >= max(1, slots // 4)):
                new, queue = queue[: slots - len(rows)], queue[slots - len(rows) :]
                if uniforms is not None:
                    numbers |= {i: uniforms(i).to(self.model.device) for i in new}
                added = self._prefill([prompts[i] for i in new], *prefix)
                tokens = self._choose(added[2], [numbers[i][0] for i in new] if numbers else None, sampling)
                for i, token in zip(new, tokens, strict=True):
                    written[i].append(token)
                cache, mask = _joined(cache, mask, *added[:2])
                rows = rows + new
            else:
                last = torch.tensor([[written[i][-1]] for i in rows], device=self.model.device)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                positions = mask.sum(1, keepdim=True) - 1
                out = self.model(
                    last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                drawn = [numbers[i][len(written[i])] for i in rows] if numbers else None
                for i, token in zip(rows, self._choose(out.logits[:, -1], drawn, sampling), strict=True):
                    written[i].append(token)
            texts = self.tokenizer.batch_decode([written[i][-tail:] for i in rows], skip_special_tokens=True)
            going = [
                place
                for place, (i, text) in enumerate(zip(rows, texts, strict=True))
                if written[i][-1] not in ends
                and len(written[i]) < max_new_tokens
                and not any(end in text for end in stop)
            ]
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                numbers = {i: numbers[i] for i in rows} if numbers else numbers
                if rows:
                    mask = _selected(cache, mask, going)
                else:
                    cache = mask = None
        return written

    def _library(self, prompts, stop, max_new_tokens, sampling, uniforms) -> list[list[int]]:
        """`generate` with another kind of cache, which is the library's to handle."""
        size, written = self.rows(max(map(len, prompts)), max_new_tokens), [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for rows in (order[start : start + size] for start in range(0, len(order), size)):
            numbers = None if uniforms is None else torch.stack([uniforms(i) for i in rows])
            stops = _Stop(self, stop, max(len(prompts[i]) for i in rows))
            found = generate(
                self.model, [prompts[i] for i in rows], self.pad_id, max_new_tokens, numbers, sampling.temperature,
                sorted(self.ends(stop)), size, sampling.top_p, stopping_criteria=StoppingCriteriaList([stops]),
            )  # fmt: skip
            for i, tokens in zip(rows, found, strict=True):  # padded, where others of the batch went on
                end = bisect_left(range(len(tokens)), True, key=lambda n, of=tokens: self.stopped(of[: n + 1], stop))
                written[i] = tokens[: end + 1]
        return written

    def ends(self, stop: Sequence[str]) -> set[int]:
        """Ids after which an answer is over: the model's own, and the special tokens among the stop strings."""
        special = self.tokenizer.added_tokens_decoder.items()
        return self.stop_ids | {i for i, token in special if token.special and token.content in stop}

    def stopped(self, tokens: list[int], stop: Sequence[str]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(end in text for end in stop)

    def text(self, tokens: list[int], stop: Sequence[str]) -> str:
        """The completion as text, cut before the first stop string."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in stop:
            text = text.split(end)[0]
        return text

    def rows(self, prompt: int, max_new_tokens: int) -> int:
        """Answers written at a time: as many as `max_batch_tokens` hold, each with a quarter of its longest length."""
        return max(1, min(ROWS, self.max_batch_tokens // (prompt + max_new_tokens // 4)))

    def _choose(self, logits: torch.Tensor, numbers: list[torch.Tensor] | None, sampling: Sampling) -> list[int]:
        _finite(logits)
        if numbers is None:
            return logits.argmax(-1).tolist()
        return draw(logits, torch.stack(numbers), *sampling)[:, 0].tolist()

    # ---- the cache -----------------------------------------------------------------------------------

    def _can_share(self) -> bool:
        """True where the cache holds keys and values of every token: no sliding window, no recurrent state."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with torch.no_grad():
            cache = getattr(self.model(probe, use_cache=True), "past_key_values", None)
        return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _padded(self, rows: list[list[int]], width: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), both `(B, width)`."""
        fill = [[0] * (width - len(row)) for row in rows]
        ids = [pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)]
        ones = [pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in zip(rows, fill, strict=True)]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(ones, device=device)

    def _prefix(self, contexts: list[list[int]]) -> tuple[DynamicCache | None, int]:
        """(cache, length) of what all contexts begin with; (None, 0) where that is not worth a forward of its own."""
        first, last = min(contexts), max(contexts)  # in order: no two have less in common
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        common = min(common, min(map(len, contexts)) - 1)  # each needs logits of its own
        if common * (len({*map(tuple, contexts)}) - 1) < WORTH_SHARING:
            return None, 0
        ids = torch.tensor([first[:common]], device=self.model.device)
        return self.model(ids, use_cache=True, **self._last_logits).past_key_values, common

    def _prefill(
        self, contexts: list[list[int]], prefix: DynamicCache | None, shared: int
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """(cache, mask `(B, T)`, logits `(B, V)` of the next token) after the contexts, padded on the left.

        `prefix` is the cache of their first `shared` tokens. Contexts that stand several times are read once.
        """
        places = {context: place for place, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
        rests = [list(context[shared:]) for context in places]
        width = max(map(len, rests))
        ids, own = self._padded(rests, width, left=True)
        mask = torch.cat([own.new_ones(len(rests), shared), own], 1)
        positions = (mask.cumsum(1) - 1)[:, -width:].clamp(min=0)
        if prefix is not None:
            prefix = _again(prefix)
            prefix.batch_repeat_interleave(len(rests))
        out = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=prefix, use_cache=True,
            **self._last_logits,
        )  # fmt: skip
        cache, logits = out.past_key_values, out.logits[:, -1]
        if len(places) < len(contexts):
            index = torch.tensor([places[tuple(context)] for context in contexts], device=mask.device)
            cache.batch_select_indices(index)
            mask, logits = mask[index], logits[index]
        return cache, mask, logits


class _Stop(StoppingCriteria):
    """True for answers, which begin at column `width`, with a stop string. The library's own reads the prompt too."""

    def __init__(self, model: Model, stop: Sequence[str], width: int):
        self.model, self.stop, self.width = model, stop, width

    def __call__(self, input_ids, scores, **kwargs):
        found = [self.model.stopped(tokens, self.stop) for tokens in input_ids[:, self.width :].tolist()]
        return torch.tensor(found, device=input_ids.device)


def _again(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in a cache of its own: what is done to that one makes new tensors and leaves `cache`."""
    again = copy.copy(cache)
    again.layers = [copy.copy(layer) for layer in cache.layers]
    return again


def _joined(cache, mask, new_cache, new_mask) -> tuple[DynamicCache, torch.Tensor]:
    """Both caches and masks as one batch, padded on the left to the longer."""
    if cache is None:
        return new_cache, new_mask
    width = max(mask.shape[1], new_mask.shape[1])

    def widened(tensor, length, dim):
        shape = list(tensor.shape)
        shape[dim] = width - length
        return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor

    for layer, new in zip(cache.layers, new_cache.layers, strict=True):
        for name in ("keys", "values"):
            parts = [(getattr(layer, name), mask.shape[1]), (getattr(new, name), new_mask.shape[1])]
            setattr(layer, name, torch.cat([widened(tensor, length, -2) for tensor, length in parts]))
    return cache, torch.cat([widened(mask, mask.shape[1], 1), widened(new_mask, new_mask.shape[1], 1)])


def _selected(cache, mask, rows: list[int]) -> torch.Tensor:
    """The mask of `rows`; the cache is cut to them, and both to the columns that one of them uses."""
    index = torch.tensor(rows, device=mask.device)
    mask = mask[index]
    empty = int(mask.any(0).int().argmax())
    for layer in cache.layers:
        layer.keys, layer.values = (tensor[index, :, empty:] for tensor in (layer.keys, layer.values))
    return mask[:, empty:]


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise RecipeExit(
            "the model's log-probabilities are not finite: its weights are damaged, or its dtype too small"
        )
    return values
