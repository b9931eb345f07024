"""A byte-level BPE tokenizer trained on the run's own documents."""

from datasets import IterableDataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_recipes._compat import fingerprint
from llm_recipes.config import TokenizerConfig, check_local
from llm_recipes.datasets import Documents, built_once, hasher, texts
from llm_recipes.errors import UserError

# Words with their leading space, single digits, punctuation runs, newlines (the split of Qwen2).
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT = ["<|im_start|>", "<|im_end|>"]  # for the chat template of the SFT stage
SPARE = [f"<|reserved_{i}|>" for i in range(12)]  # ids for later special tokens, so that no embedding is resized
TRAIN_CHARACTERS = 1_000_000_000  # more text hardly moves the merges and costs memory


def train_tokenizer(documents, vocab_size: int, name: str = "datasets") -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` ids: 256 bytes, 16 special or spare ids, the rest merges.

    Any text round-trips exactly. Raises UserError when the text supports fewer than 95 % of the ids.
    """
    special = [EOS, PAD, *CHAT, *SPARE]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"tokenizer_vocab_size {vocab_size} is below the {256 + len(special)} ids that bytes and special tokens take"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts(documents, name)), trainer)
    if (got := tokenizer.get_vocab_size()) < 0.95 * vocab_size:
        raise UserError(
            f"tokenizer_vocab_size: asked for {vocab_size}, the text supports {got}: ask for less or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[*CHAT, *SPARE],
        clean_up_tokenization_spaces=False,
    )


def _limited(source):
    used = 0
    for text in source:
        used += len(text)
        if used > TRAIN_CHARACTERS:
            return
        yield text


def load_tokenizer(
    config: TokenizerConfig, documents: list[Documents], model_name_or_path: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of `config`: loaded, or trained on the train documents and kept in the cache.

    A model that is continued brings its own. As in `datasets.tokenize`, one process trains while the others wait at a file lock.
    """
    if model_name_or_path and config.tokenizer_vocab_size is not None:
        raise UserError(
            "tokenizer_vocab_size: a new tokenizer does not fit the embeddings of model_name_or_path: remove it"
        )
    if (name := config.tokenizer_name_or_path or model_name_or_path) is not None:
        if config.tokenizer_vocab_size is not None:
            raise UserError("set tokenizer_name_or_path or tokenizer_vocab_size, not both")
        name = check_local("tokenizer_name_or_path", name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer_name_or_path: {name}: {str(error).splitlines()[0]}") from error
        if tokenizer.eos_token_id is None or not tokenizer.is_fast:
            raise UserError(f"tokenizer_name_or_path: {name} needs an eos_token and a tokenizer.json")
        return tokenizer
    if config.tokenizer_vocab_size is None:
        raise UserError("set tokenizer_name_or_path, or tokenizer_vocab_size to train one on the datasets")
    trains = [part.train for part in documents]
    if any(isinstance(train, IterableDataset) for train in trains):
        raise UserError(
            "streaming cannot train a tokenizer on the spot: run recipes/tokenizer/run.py and set tokenizer_name_or_path"
        )
    key = hasher(*map(fingerprint, trains), config.tokenizer_vocab_size, SPLIT, *SPARE)
    rows = (row for train in trains for row in train)
    return AutoTokenizer.from_pretrained(
        built_once(
            f"tokenizer-{key}",
            lambda folder: train_tokenizer(rows, config.tokenizer_vocab_size).save_pretrained(folder),
        )
    )


def quality(tokenizer, held_out: list[str]) -> dict:
    """Compression on held-out text, and how many of its documents do not come back byte for byte."""
    if not held_out:
        return {}
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(held_out, add_special_tokens=False)
    tokens = sum(len(encoding.ids) for encoding in encodings)
    decoded = tokenizer.backend_tokenizer.decode_batch([e.ids for e in encodings], skip_special_tokens=False)
    return {
        "bytes_per_token": sum(len(text.encode()) for text in held_out) / tokens,
        "tokens_per_word": tokens / sum(len(text.split()) for text in held_out),
        "round_trip_failures": sum(a != b for a, b in zip(held_out, decoded, strict=True)),
    }
