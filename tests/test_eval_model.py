"""What stands between a benchmark and its numbers: log-likelihoods and answers, fast, against one sequence at a time."""

import random

import pytest
import torch
from scipy.stats import chisquare
from transformers.cache_utils import DynamicCache

from llm_recipes.answers import draw
from llm_recipes.errors import RecipeExit
from llm_recipes.evaluation.model import Model, Sampling, _joined, _selected
from tests.evaluating import ids, network, tiny, tokenizer

ALONE, BATCHED = tiny(1), tiny(4096)
PREFIX = ids(99, 40)
REQUESTS = [
    (ids(0, 3), [ids(1, 1), ids(2, 1), ids(3, 1)]),  # letters
    (PREFIX + ids(4, 9), [ids(5, 12), ids(6, 1), ids(7, 5)]),  # begin alike, choices of many lengths
    (PREFIX + ids(8, 30), [ids(9, 2)]),
    (PREFIX + ids(8, 30), [ids(9, 2), ids(10, 20)]),  # the same context again
    (PREFIX, [ids(11, 3), ids(12, 4)]),  # a context that others begin with
    ([0], [ids(13, 6), ids(14, 1)]),  # empty: the EOS alone
    (ids(15, 1), [ids(15, 40)]),
]  # fmt: skip


def plain(model, context: list[int], continuation: list[int]) -> float:
    """One sequence alone, by transformers and the definition."""
    whole = (context + continuation)[-(model.config.max_position_embeddings + 1) :]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole[:-1]])).logits[0].float().log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(logprobs[-len(continuation) :].gather(1, targets[:, None])[:, 0].sum())


def worst(found, expected) -> float:
    assert [len(row) for row in found] == [len(row) for row in expected]
    return max(abs(a - b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True))


EXPECTED = [[plain(network(), context, cont) for cont in conts] for context, conts in REQUESTS]


# ---- log-likelihoods -------------------------------------------------------------------------------


def test_alone_is_a_plain_loop_to_the_bit():
    assert ALONE.loglikelihoods(REQUESTS) == EXPECTED


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "phi"])
def test_batched_and_shared(kind):
    """Positions: rotary, learned, learned with an offset, ALiBi."""
    model = tiny(4096, kind)
    assert model.shares
    expected = [[plain(network(kind), context, cont) for cont in conts] for context, conts in REQUESTS]
    assert worst(model.loglikelihoods(REQUESTS), expected) < 5e-5


@pytest.mark.parametrize("seed", range(6))
def test_whatever_stands_in_the_batch(seed):
    rng = random.Random(seed)
    some = [rng.randrange(len(REQUESTS)) for _ in range(rng.randint(1, 9))]
    found = BATCHED.loglikelihoods([REQUESTS[i] for i in some])
    assert worst(found, [EXPECTED[i] for i in some]) < 5e-5


@pytest.mark.parametrize("tokens", [2, 50, 100, 300, 4096])
def test_whole_sequences_in_batches_of_any_size(tokens):
    model = tiny(tokens, "mistral", sliding_window=16)
    assert not model.shares
    expected = [[plain(model.model, context, cont) for cont in conts] for context, conts in REQUESTS]
    assert worst(model.loglikelihoods(REQUESTS), expected) < 5e-5
    one_by_one = [model.loglikelihoods([request])[0] for request in REQUESTS]
    assert worst(one_by_one, expected) < 5e-5


@pytest.mark.parametrize("model", [ALONE, BATCHED], ids=["alone", "batched"])
@pytest.mark.parametrize(("context", "continuation"), [(127, 1), (127, 2), (128, 1), (128, 5), (129, 1), (300, 128)])
def test_what_does_not_fit_is_cut_on_the_left(model, context, continuation):
    request = (ids(20, context), [ids(21, continuation)])
    expected = [[plain(network(), request[0], request[1][0])], EXPECTED[1]]
    assert worst(model.loglikelihoods([request, REQUESTS[1]]), expected) < 5e-5


def test_a_model_without_logits_to_keep():
    model = Model(network(), tokenizer(), 1)
    model.keeps_logits = False
    assert worst(model.loglikelihoods(REQUESTS), EXPECTED) < 5e-5


def test_pairs_are_parted_as_lm_eval_parts_them():
    model = tiny(1)
    tok = model.tokenizer
    for context, continuation in [("the cat", " sees"), ("the cat ", "sees"), ("a\n", "b"), ("é", "x")]:
        left, right = model.encode_pair(context, continuation)
        assert left == tok.encode(context.rstrip()) and tok.decode(left + right) == context + continuation
    joined = model.encode_pair("the d", "og sees")  # merged over the seam: the whole's ids from there on
    assert joined == (tok.encode("the d"), tok.encode("the dog sees")[len(tok.encode("the d")) :])
    assert model.encode_pair("", " a") == ([0], tok.encode(" a"))
    assert model.encode_pair("\n", "a") == ([0], tok.encode("\na"))  # nothing but white space is as good as nothing


def test_a_bos_stands_once():
    model = tiny(1, bos=True)
    bos = model.prefix_id
    assert bos == 4 and model.encode("the cat")[:2].count(bos) == 1
    assert model.encode("<|reserved_0|>the cat") == model.encode("the cat")
    assert model.encode_pair("", " a")[0] == [bos] and bos not in model.encode_pair("", " a")[1]
    assert model.encode_pair("the cat", " a")[0].count(bos) == 1


@pytest.mark.parametrize("model", [ALONE, BATCHED], ids=["alone", "batched"])
def test_numbers_that_are_none_stop_the_run(model):
    weights = model.model.lm_head.weight.data
    before = weights[7].clone()
    weights[7] = float("nan")
    try:
        for act in (lambda: model.loglikelihoods(REQUESTS[:2]), lambda: model.generate([ids(0, 4)], (), 2)):
            with pytest.raises(RecipeExit, match="not finite"):
                act()
    finally:
        weights[7] = before


# ---- answers ---------------------------------------------------------------------------------------

PROMPTS = [PREFIX + ids(30, 3), ids(31, 2), PREFIX + ids(32, 20), ids(33, 60), [5], ids(34, 7), PREFIX + ids(35, 4)]
PROMPTS += [PROMPTS[2], PROMPTS[0], PROMPTS[0]]  # several times
NEW = 24


def greedy(model, prompt: list[int], length: int = NEW) -> list[int]:
    """One prompt alone, by transformers, until the EOS alone ends it."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=1,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


FREE = {tuple(prompt): greedy(network(), prompt) for prompt in PROMPTS}


def until(model: Model, tokens: list[int], stop) -> list[int]:
    """The first tokens whose text holds a stop string, or that end with one of the ends."""
    for n in range(1, len(tokens) + 1):
        text = model.tokenizer.decode(tokens[:n], skip_special_tokens=True)
        if tokens[n - 1] in model.ends(stop) or any(end in text for end in stop):
            return tokens[:n]
    return tokens


@pytest.mark.parametrize("budget", [1, 60, 150, 400, 8192])
def test_answers_are_those_of_one_prompt_at_a_time(budget):
    """From one place in the batch to more than there are prompts."""
    model = tiny(budget)
    assert model.shares
    assert model.generate(PROMPTS, (), NEW) == [until(model, FREE[tuple(prompt)], ()) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "model", [tiny(150), tiny(8192), tiny(150, "mistral", sliding_window=1000), tiny(8192, "mistral", sliding_window=1000)],
    ids=["shared 150", "shared 8192", "library's 150", "library's 8192"],
)  # fmt: skip
def test_an_answer_ends_where_it_should(model):
    """At the EOS, another end of the model's, a stop string or a special token among these; nothing stands after it."""
    free = FREE if model.shares else {tuple(prompt): greedy(model.model, prompt) for prompt in PROMPTS}
    tok, ends = model.tokenizer, model.stop_ids
    drawn = [free[tuple(prompt)] for prompt in PROMPTS]
    texts = [tok.decode(tokens, skip_special_tokens=True) for tokens in drawn]
    cases = [(), ("not there",)]
    cases += [tuple(text[i : i + 3] for text in texts[::2]) for i in (0, 5, 11)]  # over the borders of tokens
    cases += [(tok.convert_ids_to_tokens(token),) for token in (0, 2, 7)]
    try:
        for added in (set(), {drawn[0][6], drawn[1][0]}):
            model.stop_ids = ends | added
            for stop in cases:
                expected = [until(model, tokens, stop) for tokens in drawn]
                assert model.generate(PROMPTS, stop, NEW) == expected, (stop, added)
    finally:
        model.stop_ids = ends
    assert sum(len(until(model, t, cases[3])) < NEW for t in drawn) > 3  # the strings did stop some


@pytest.mark.parametrize("keys", [{}, {"kind": "mistral", "sliding_window": 1000}], ids=["shared", "library's"])
def test_the_prompt_holds_no_part_of_a_stop_string(keys):
    model = tiny(4096, **keys)
    first = greedy(model.model, PREFIX, 4)
    across = model.tokenizer.decode(PREFIX[-1:]) + model.tokenizer.decode(first[:1])
    assert model.generate([PREFIX], [across], 4)[0] == until(model, first, [across])


def test_a_special_token_among_the_stop_strings_stops():
    """It is not in the text, which is decoded without: <|im_end|> of the harness's lists."""
    model = tiny(4096)
    expected = FREE[tuple(PROMPTS[0])]
    head, weights = model.model.lm_head.weight.data, model.model.lm_head.weight.data.clone()
    try:
        head[3] = head[expected[5]] * 1.5  # <|im_end|> is likelier now wherever that token was
        ended = model.generate([PROMPTS[0]], ["<|im_end|>"], NEW)[0]
        assert 3 not in model.stop_ids and ended[-1] == 3 and len(ended) <= 6
        assert len(model.generate([PROMPTS[0]], ["x<|im_end|>"], NEW)[0]) > len(ended)
    finally:
        head[:] = weights


def test_text_is_cut_before_the_stop_string():
    model = tiny(1)
    tokens = model.tokenizer.encode("red fish runs likes")
    assert model.text(tokens, ["runs", "fi"]) == "red " and model.text(tokens, []) == "red fish runs likes"
    assert model.text([*tokens, 0], ["cat"]) == "red fish runs likes"  # the EOS is no text


def test_a_sliding_window_is_left_to_the_library():
    model = tiny(4096, "mistral", sliding_window=16)
    assert not model.shares
    expected = [greedy(model.model, prompt) for prompt in PROMPTS]
    assert model.generate(PROMPTS, (), NEW) == [until(model, tokens, ()) for tokens in expected]


# ---- sampling --------------------------------------------------------------------------------------


def numbers(i: int) -> torch.Tensor:
    return torch.rand(NEW, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9)])
@pytest.mark.parametrize("keys", [{}, {"kind": "mistral", "sliding_window": 16}], ids=["shared", "library's"])
def test_an_answer_follows_from_its_own_numbers(keys, sampling):
    alone = tiny(1, **keys)
    expected = [
        alone.generate([prompt], (), NEW, sampling, lambda _, i=i: numbers(i))[0] for i, prompt in enumerate(PROMPTS)
    ]
    assert len({*map(tuple, expected)}) == len(PROMPTS)  # the same prompt three times, three answers
    for budget in (150, 8192):
        assert tiny(budget, **keys).generate(PROMPTS, (), NEW, sampling, numbers) == expected


def test_sampled_tokens_have_the_probabilities_of_the_model():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        found = draw(logits.repeat(len(uniforms), 1), uniforms, temperature)[:, 0].bincount(minlength=5)
        expected = (logits.double() / temperature).softmax(0) * len(uniforms)
        assert chisquare(found.numpy(), expected.numpy()).pvalue > 0.001


@pytest.mark.parametrize("seed", range(20))
def test_top_p_by_brute_force(seed):
    """Tokens from the likeliest down until their share reaches p; and the shares of those alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator) * 2
    p = 0.05 + 0.9 * float(torch.rand((), generator=generator))
    probs, kept, mass = logits[0].softmax(0), [], 0.0
    for token in probs.argsort(descending=True).tolist():
        kept.append(token)
        mass += float(probs[token])
        if mass >= p:
            break
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    found = draw(logits.repeat(20_000, 1), uniforms, 1.0, p)[:, 0].bincount(minlength=12) / 20_000
    expected = torch.zeros(12).index_put((torch.tensor(kept),), probs[kept] / mass)
    assert {*found.nonzero()[:, 0].tolist()} <= {*kept} and (found - expected).abs().max() < 1.1e-4


def test_the_edges_of_a_random_number():
    logits = torch.tensor([[-30.0, 0.0, 0.0, -float("inf")]])
    assert draw(logits, torch.tensor([0.0]), 1.0).item() in (0, 1)
    assert draw(logits, torch.tensor([1 - 2**-24]), 1.0).item() == 2  # never one of probability 0


# ---- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_the_cache_are_never_mixed(seed):
    """Keys and values say whose they are and where; rows come and go in any order."""
    rng = random.Random(seed)

    def batch(rows: list[tuple[int, int]]):
        """(cache, mask) of rows (name, length), padded on the left."""
        width = max(length for _, length in rows)
        keys = torch.full((len(rows), 2, width, 3), -1.0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (name, length) in enumerate(rows):
            keys[i, :, width - length :] = torch.arange(length)[None, :, None] + 1000.0 * name
            mask[i, width - length :] = 1
        cache = DynamicCache()
        for layer in range(2):
            cache.update(keys + 0.25 * layer, keys + 0.5 + 0.25 * layer, layer)
        return cache, mask

    rows, cache, mask = [], None, None
    for step in range(12):
        new = [(100 * step + i, rng.randint(1, 30)) for i in range(rng.randint(1, 4))]
        cache, mask = _joined(cache, mask, *batch(new))
        rows += new
        kept = sorted(rng.sample(range(len(rows)), rng.randint(1, len(rows))))
        mask, rows = _selected(cache, mask, kept), [rows[i] for i in kept]
        assert mask.shape == (len(rows), max(length for _, length in rows))  # no column that nobody uses
        assert mask.sum(1).tolist() == [length for _, length in rows]
        for layer in range(2):
            for part, shift in (("keys", 0.0), ("values", 0.5)):
                held = getattr(cache.layers[layer], part)
                assert held.shape[0] == len(rows) and held.shape[2] == mask.shape[1]
                for i, (name, length) in enumerate(rows):
                    own = held[i, :, mask[i].bool()]
                    expected = torch.arange(length) + 1000.0 * name + shift + 0.25 * layer
                    assert torch.equal(own, expected[None, :, None].expand(2, -1, 3))
