"""From rows to token ids for post-training: conversations for SFT, pairs for reward models and DPO, prompts for PPO.

Every row becomes messages (`to_messages`, `to_preference`, `to_prompt`), the tokenizer's chat template renders them, and the loss
falls on what the template marks with {% generation %}: the assistant's words and the token that ends its turn. Rows
that cannot be used are left out, counted and said; nothing is truncated.
"""

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import xxhash
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl import get_training_chat_template, pack_dataset

from llm_recipes._compat import fingerprint
from llm_recipes.config import ConversationConfig, Source, micro_batch
from llm_recipes.datasets import cache_dir, hasher, hold_out, load_rows, mix, rename, take_text_whole, whole_batches
from llm_recipes.errors import UserError
from llm_recipes.launch import global_batch
from llm_recipes.tokenization import CHAT, PAD

# ChatML, for a base model that has no template.
TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
BATCH = 1000  # rows encoded at a time
PLACEHOLDER = "\ue000"  # private use: in the place of a special token's string that a user wrote

# ---- rows to messages ----------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


class Unusable(ValueError):
    """Why a row is left out, in the words of the report."""


def to_messages(row: dict) -> list[dict]:
    """The messages `[{"role", "content"}, ...]` of a row in one of four layouts, tried in this order:

    - `messages`: as they are;
    - `conversations`: ShareGPT, `[{"from": "human" | "gpt" | "system", "value"}, ...]`;
    - `prompt` and `completion`: two texts, or two lists of messages;
    - `instruction`, `input` (may be empty or missing) and `output`: Alpaca; the input follows the instruction after an
      empty line.

    `columns` of a source renames others: {prompt: question, completion: answer}. Raises Unusable for a row
    without a word of the assistant.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("conversations") is not None:
        messages = [_turn(turn) for turn in row["conversations"]]
    elif row.get("prompt") is not None:
        messages = _as_messages(row["prompt"], "user") + _as_messages(row.get("completion"), "assistant")
    elif row.get("instruction") is not None:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        prompt = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
        messages = _as_messages(prompt, "user") + _as_messages(row.get("output"), "assistant")
    else:
        raise Unusable("have no messages")
    messages = _checked(messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise Unusable("have an empty answer")
    return messages


def to_preference(row: dict) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompt, chosen, rejected) as messages, of a row with these layouts of its `chosen` and `rejected`:

    - an answer each, text or messages, beside a `prompt` of text or messages;
    - whole conversations as messages, with or without `prompt`: their common beginning is the prompt. Messages that
      begin with the assistant continue the `prompt`;
    - whole conversations as text with turns "\\n\\nHuman: " and "\\n\\nAssistant: " (HH-RLHF).

    Raises Unusable where there is nothing to prefer.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and chosen.lstrip().startswith("Human:") and not row.get("prompt"):
        chosen, rejected = _hh(chosen), _hh(rejected or "")
    prompt = _checked(_as_messages(row.get("prompt") or [], "user"))
    sides = [_checked(_as_messages(side, "assistant")) for side in (chosen, rejected)]
    chosen, rejected = (side if side and side[0]["role"] != "assistant" else prompt + side for side in sides)
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if common is None:
        raise Unusable("have the same chosen and rejected")
    prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not prompt:
        raise Unusable("have no prompt")
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            raise Unusable("have an empty answer")
    return prompt, chosen, rejected


def to_prompt(row: dict) -> list[dict]:
    """The messages to be answered: `prompt`, text or messages, or the text `question`. Raises Unusable where nothing is asked."""
    asked = row.get("question") if row.get("prompt") is None else row["prompt"]
    messages = _checked(_as_messages(asked, "user"))
    if not messages or messages[-1]["role"] == "assistant" or not messages[-1]["content"].strip():
        raise Unusable("have no prompt")
    return messages


def _as_messages(value, role: str) -> list[dict]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": value or ""}]


def _turn(turn) -> dict:
    """A turn of ShareGPT as a message; some data sets have messages under `conversations`."""
    if isinstance(turn, dict) and "from" in turn:
        return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def _checked(messages: list[dict]) -> list[dict]:
    """Messages with role and content alone; Unusable where there is something else to them."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable("have messages without a role")
        more = any(message.get(key) for key in ("tool_calls", "function_call", "reasoning_content"))
        if more or not isinstance(message.get("content"), str):
            raise Unusable("hold something else than text (images, tool calls); these recipes train on text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _hh(text: str) -> list[dict]:
    turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


# ---- tokenizer and template ----------------------------------------------------------------------


class ChatTokenizer(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    report: list[str]  # what was changed, in sentences
    added: int  # ids that the model's embeddings may have no room for
    untrained: bool  # the model has never seen the tokens that begin and end a turn


def load_chat_tokenizer(name: str, revision: str, template_path: str | None = None) -> ChatTokenizer:
    """The tokenizer of a model, with a chat template, an end of turn and a padding token of its own.

    A template that is there is taken as it is; a base model gets ChatML, its turns ended by <|im_end|>, which becomes
    the EOS. Padding with the EOS would hide where an answer ends, so then another special token is taken.
    """
    report = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name} has no tokenizer: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model_name_or_path: {name} has no tokenizer.json")
    size, untrained = len(tokenizer), tokenizer.chat_template is None and not template_path
    if template_path:
        try:
            tokenizer.chat_template = Path(template_path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template_path: {template_path}: {error}") from error
    elif untrained:
        tokenizer.add_special_tokens({"extra_special_tokens": CHAT}, replace_extra_special_tokens=False)
        tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, CHAT[1]
        report.append(f"no chat template in {name}: ChatML put in, turns end with {CHAT[1]}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        taken = (tokenizer.eos_token, tokenizer.bos_token, *CHAT)
        spare = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in taken]
        why = "none" if tokenizer.pad_token is None else f"{tokenizer.pad_token}, the EOS"
        tokenizer.add_special_tokens({"pad_token": next((t for t in spare if "pad" in t), spare[0] if spare else PAD)})
        report.append(f"padding was {why}; now it is {tokenizer.pad_token}")
    if added := len(tokenizer) - size:
        report.append(f"{added} ids added to the tokenizer, and to the model's embeddings where they have no room")
    return ChatTokenizer(tokenizer, report, added, untrained)


class Encoder:
    """Messages to ids, with the template that marks what the assistant says.

    Text stays text: a special token's string that somebody wrote, such as <|im_end|>, gets the ids of its
    characters. Only the template writes special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        try:
            self.template, self.marks = get_training_chat_template(tokenizer) or tokenizer.chat_template, True
        except ValueError:  # one that TRL does not know; then each answer is found by what it adds to the text
            self.template, self.marks = tokenizer.chat_template, False
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
        probe = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            asked = self._render(probe[:1], True)[0]
            header = asked.removeprefix(self._render(probe[:1])[0])  # what asks the assistant to speak
            self.header = header[: header.find("\n") + 1] or header  # but for a <think> of the next lines
            ((ids, _),) = self.encode([self.pieces(probe)])
        except Unusable as reason:
            raise UserError(f"a user's and an assistant's message {reason}") from reason
        native = tokenizer(self._render(probe)[0], add_special_tokens=False)["input_ids"]
        if native[: len(ids)] != ids:
            raise UserError("this tokenizer joins text over special tokens, which these recipes do not support")
        self.stop_id = ids[-1]
        if self.stop_id == tokenizer.pad_token_id:
            raise UserError(
                f"{tokenizer.pad_token} ends the answers of this chat template and is its padding too: give the tokenizer another pad_token"
            )
        if self.stop_id not in self.ids.values():
            last = tokenizer.decode(ids[-1:])
            raise UserError(
                f"the chat template ends an answer with {last!r}, which is no special token: the model would not learn "
                "to stop. Put the end of turn between {% generation %} and {% endgeneration %}"
            )

    @property
    def digest(self) -> str:
        """Of all that the ids depend on beside the rows."""
        return hasher(self.tokenizer.backend_tokenizer.to_str(), self.template)

    def _render(self, messages: list[dict], prompt: bool = False) -> tuple[str, list]:
        """(text, spans of the assistant's words and ends of turn in it)."""
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except (TemplateError, TypeError) as error:
            raise Unusable(f"are refused by the chat template ({error})") from error
        return texts[0], spans[0] if self.marks else []

    def _answers(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """The spans for a template without marks: from the assistant's header to the last special token of its turn."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self._render(messages[:i], True)[0], self._render(messages[: i + 1])[0]
                if not (text.startswith(after) and after.startswith(before)):
                    raise Unusable("are rendered by the chat template so that no answer can be told from its prompt")
                ends = [found.end() for found in self.special.finditer(after)]
                spans.append((len(before), ends[-1] if ends and ends[-1] > len(before) else len(after)))
        return spans

    def _said(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Marked spans without what the prompt for an answer gives, and without white space after the end of turn.

        TRL's templates mark such: the line break after "assistant" for Qwen2.5, the one after <|im_end|> for all Qwens.
        """
        found, begins = [], {start for start, _ in spans}
        for start, end in spans:
            given = text.find(self.header, max(0, start - len(self.header) + 1), start + len(self.header))
            ends = [control.end() for control in self.special.finditer(text, start, end)]
            if ends and end not in begins and not text[ends[-1] : end].strip():
                end = ends[-1]
            found.append((start if given < 0 else given + len(self.header), end))
        return found

    def pieces(self, messages: list[dict], prompt: bool = False) -> list[tuple[str, bool, bool]]:
        """[(text, is a special token, is the assistant's)], in order. Raises Unusable for what the template refuses."""
        safe = [
            m | {"content": self.special.sub(lambda found: PLACEHOLDER * len(found[0]), m["content"])} for m in messages
        ]
        marked, spans = self._render(safe, prompt)
        spans = spans if self.marks else self._answers(safe, marked)
        text = marked if safe == messages else self._render(messages, prompt)[0]
        if len(text) != len(marked):
            raise Unusable("hold special tokens, which this chat template would take for its own")
        controls = [found.span() for found in self.special.finditer(marked)]
        spans = self._said(marked, spans) if self.marks else spans
        if not _all_said(marked, [message["content"] for message in safe]):
            raise Unusable("are rendered by the chat template without all that they say")
        cuts = sorted({0, len(text), *(at for span in (*controls, *spans) for at in span)})
        starts = {start for start, _ in controls}
        parts = [(a, b) for a, b in pairwise(cuts) if b > a]
        return [(text[a:b], a in starts, any(s <= a and b <= e for s, e in spans)) for a, b in parts]

    def encode(
        self, conversations: list[list[tuple[str, bool, bool]]], whole: bool = False
    ) -> list[tuple[list[int], list[bool]]]:
        """(ids, assistant's) of the `pieces` of each conversation, up to the last token that the assistant says.

        With `whole` also of what the template writes after it, such as a newline.
        """
        backend = self.tokenizer.backend_tokenizer
        take_text_whole(self.tokenizer)
        plain = [text for pieces in conversations for text, special, _ in pieces if not special]
        encodings = iter(backend.encode_batch_fast(plain, add_special_tokens=False))
        backend.encode_special_tokens = False
        encoded = []
        for pieces in conversations:
            ids, mask = [], []
            for text, special, assistant in pieces:
                new = [self.ids[text]] if special else next(encodings).ids
                ids += new
                mask += [assistant] * len(new)
            end = len(mask) if whole or True not in mask else len(mask) - mask[::-1].index(True)
            encoded.append((ids[:end], mask[:end]))
        return encoded


def _all_said(text: str, contents: list[str]) -> bool:
    """Whether `text` holds all `contents`, but for white space; tools' results may be in it as JSON."""
    text = "".join(text.split())
    return all(
        any("".join(said.split()) in text for said in (content, json.dumps(content, ensure_ascii=False)[1:-1]))
        for content in contents
    )


# ---- rows to columns -----------------------------------------------------------------------------

NEEDS = {
    "sft": [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"}],
    "pairs": [{"chosen", "rejected"}],
    "scored": [{"chosen", "rejected"}],
    "prompts": [{"prompt"}, {"question"}],
}
TAKEN = {  # what reward functions are given beside the columns, and columns of ours
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "input_ids", "labels",
    "prompt_ids", "chosen_ids", "rejected_ids", "draw",
}  # fmt: skip
IDS = {"input_ids", "prompt_ids", "chosen_ids", "rejected_ids"}  # the columns that a model reads


def limit_of(kind: str) -> str:
    """The key that says how many tokens a row of this kind may have."""
    return "max_prompt_length" if kind == "prompts" else "max_length"


def _parts(encoder: Encoder, row: dict, kind: str) -> list:
    """Pieces of what is to be encoded of a row: the conversation, or the prompt alone and both answered ones."""
    if kind == "sft":
        return [encoder.pieces(to_messages(row))]
    if kind == "prompts":
        return [encoder.pieces(to_prompt(row), prompt=True)]
    prompt, chosen, rejected = to_preference(row)
    if kind == "pairs" and any(message["role"] != "assistant" for message in chosen + rejected):
        raise Unusable("differ before the last answer: the loss would be on other words than the assistant's too")
    return [encoder.pieces(prompt, prompt=True), encoder.pieces(prompt + chosen), encoder.pieces(prompt + rejected)]


def _columns(encoded: list, row: dict, kind: str, max_length: int | None) -> dict:
    """Columns of the dataset: `input_ids` and `labels` for SFT; `prompt_ids`, `chosen_ids` and `rejected_ids` after it
    for DPO; `chosen_ids` and `rejected_ids` with the prompt, its size, and `margin` (0 where a row has none), for reward models;
    `prompt_ids`, `prompt` as messages, and all else in the row, which rewards may read, for PPO."""
    if max_length and max(len(ids) for ids, _ in encoded) > max_length:
        raise Unusable(f"are longer than {limit_of(kind)} {max_length}")
    if kind == "prompts":
        return row | {"prompt_ids": encoded[0][0], "prompt": to_prompt(row)}
    if kind == "sft":
        ((ids, mask),) = encoded
        return {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}
    (prompt, _), (chosen, _), (rejected, _) = encoded
    size = len(prompt)
    if chosen[:size] != prompt or rejected[:size] != prompt:
        raise Unusable("are rendered in another way by the chat template once they are answered")
    if kind == "pairs":
        return {"prompt_ids": prompt, "chosen_ids": chosen[size:], "rejected_ids": rejected[size:]}
    try:
        margin = float(row.get("margin") or 0)
    except (TypeError, ValueError) as error:
        raise Unusable("have a margin that is no number") from error
    return {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_size": size, "margin": margin}


def encode_rows(encoder: Encoder, rows: list[dict], kind: str, max_length: int | None) -> list[dict | str]:
    """The columns of each row, or why it is left out."""
    results, parts = [], []
    for row in rows:
        try:
            parts.append(_parts(encoder, row, kind))
            results.append(row)
        except Unusable as reason:
            results.append(str(reason))
    encoded = iter(encoder.encode([piece for part in parts for piece in part]))
    sizes = iter(map(len, parts))
    for i, row in enumerate(results):
        if isinstance(row, dict):
            try:
                results[i] = _columns([next(encoded) for _ in range(next(sizes))], row, kind, max_length)
            except Unusable as reason:
                results[i] = str(reason)
    return results


def encode_source(source: Source, documents: Dataset, encoder: Encoder, kind: str, max_length: int | None):
    """(dataset, stats) of one source, memory-mapped and cached as in `datasets.tokenize`.

    `stats` has rows, tokens, the digest of the ids, and why how many rows were left out: {reason: [count, first row]}.
    """
    code = Path(__file__).read_text(encoding="utf-8")  # rows that another version of it made are not taken for its own
    special = encoder.tokenizer.special_tokens_map  # which templates write too
    key = hasher(fingerprint(documents), encoder.digest, special, code, kind, max_length)
    arrow, info = cache_dir() / f"{key}.arrow", cache_dir() / f"{key}.json"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{arrow}.lock"):
        if not (arrow.is_file() and info.is_file()):
            stats = {"rows": 0, "tokens": 0, "left_out": {}}
            digest, partial, out = xxhash.xxh3_128(), arrow.with_suffix(".partial"), None
            schema = _prompt_schema(documents) if kind == "prompts" else None
            for start in range(0, len(documents), BATCH):
                results = encode_rows(
                    encoder,
                    documents.select(range(start, min(start + BATCH, len(documents)))).to_list(),
                    kind,
                    max_length,
                )
                for row, reason in enumerate(results, start):
                    if isinstance(reason, str):
                        stats["left_out"].setdefault(reason, [0, row])[0] += 1
                if not (good := [columns for columns in results if isinstance(columns, dict)]):
                    continue
                table = pa.Table.from_pylist(good, schema)
                out = out or pa.ipc.new_stream(str(partial), table.schema)
                out.write_table(table)
                stats["rows"] += len(good)
                stats["tokens"] += sum(len(columns[name]) for columns in good for name in IDS & columns.keys())
                digest.update(json.dumps(good, default=str).encode())
            if out is None:
                what = "; ".join(f"{n:,} {reason}" for reason, (n, _) in stats["left_out"].items()) or "it has none"
                raise UserError(f"datasets: {source.path}: no row is left to train on: {what}")
            out.close()
            stats["digest"] = digest.hexdigest()
            info.write_text(json.dumps(stats))
            os.replace(partial, arrow)
    return Dataset.from_file(str(arrow)), json.loads(info.read_text())


def _prompt_schema(documents: Dataset) -> pa.Schema:
    """Of rows with prompts: a batch of rows alone would not tell the types of the columns that are not ours."""
    ours = {
        "prompt_ids": pa.list_(pa.int64()),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    }
    theirs = {field.name: field.type for field in documents.features.arrow_schema}
    return pa.schema(theirs | ours)


def make_rows(config: ConversationConfig, encoder: Encoder, kind: str, args):
    """(train, held out or None, report, digests): all sources of `config`, encoded, mixed and cut to whole batches.

    `kind` is "sft" (input_ids, labels), "pairs" (prompt_ids, chosen_ids, rejected_ids), "scored" (the same with
    their prompts, and margin) or "prompts" (prompt_ids, prompt, and all columns that are not ours; whole rollouts to
    train on). Of `datasets`, `eval_fraction` is held out unless there are `eval_datasets`.
    """
    report, digests, trains, evals, tokens = [], [], [], [], []
    longest = getattr(config if kind == "prompts" else args, limit_of(kind))
    for source in config.datasets:
        encoded, stats = encode_source(source, _load(source, kind), encoder, kind, longest)
        tokens.append(stats["tokens"])
        digests.append(stats["digest"])
        report += _said(source, stats)
        if config.eval_fraction and not config.eval_datasets:
            if len(encoded) < 2:
                raise UserError(f"datasets: {source.path} has one row: none can be held out; set eval_fraction: 0")
            encoded, held_out = hold_out(encoded, config.eval_fraction, args.seed)
            evals.append(held_out)
        trains.append(encoded)  # the Trainer shuffles
    for source in config.eval_datasets:
        encoded, stats = encode_source(source, _load(source, kind), encoder, kind, longest)
        evals.append(encoded)
        report += [f"held out: {line}" for line in _said(source, stats)]
    try:
        train, taken = mix(trains, [source.weight for source in config.datasets], args.seed, tokens)
        evaluation = concatenate_datasets(evals) if evals else None
    except ValueError as error:  # a column of prompts that is not ours
        raise UserError(f"datasets: the columns of the sources do not fit together: {error}") from error
    for source, encoded, used in zip(config.datasets, trains, taken, strict=True):
        if used < len(encoded):
            report.append(f"{source.path}: {used:,} of {len(encoded):,} rows used, to keep the weights")
    if getattr(args, "packing", False):
        rows = len(train)
        train = pack_dataset(train.shuffle(seed=args.seed), args.max_length, args.packing_strategy)
        report.append(f"{rows:,} rows packed into {len(train):,} of up to {args.max_length} tokens")
        if evaluation is not None and args.eval_packing is not False:
            evaluation = pack_dataset(evaluation, args.max_length, args.packing_strategy)
    batch_size = global_batch(args)
    drawn, what = (batch_size, "batch") if kind != "prompts" else (args.rollout_size // args.num_generations, "rollout")
    if len(train) < drawn:
        raise UserError(f"datasets: {len(train)} rows to train on, fewer than one {what} of {drawn}")
    train = whole_batches(train, drawn, report, args.seed, "rows to train on")
    if evaluation is not None:
        args.per_device_eval_batch_size = micro_batch(
            args.per_device_train_batch_size * args.gradient_accumulation_steps, args.per_device_eval_batch_size
        )
        evaluation = whole_batches(evaluation, batch_size, report, args.seed, "held-out rows")
    return train, evaluation, report, digests


def _said(source: Source, stats: dict) -> list[str]:
    lost = sum(count for count, _ in stats["left_out"].values())
    total = stats["rows"] + lost
    lines = [f"{source.path}: {stats['rows']:,} rows, {stats['tokens']:,} tokens"]
    if lost:
        why = "; ".join(f"{count:,} {reason} (first: row {row})" for reason, (count, row) in stats["left_out"].items())
        lines.append(f"{source.path}: {lost:,} of {total:,} rows left out ({lost / total:.1%}): {why}")
    return lines


def _load(source: Source, kind: str) -> Dataset:
    """The rows of a source as they are stored. Raises UserError for columns that no row of this kind can have."""
    rows = rename(load_rows(source), source, "datasets")
    if images := {"image", "images"} & set(rows.column_names):
        raise UserError(f"datasets: {source.path} has a column {images.pop()}: these recipes train on text alone")
    if kind == "prompts" and (taken := TAKEN & set(rows.column_names)):
        raise UserError(
            f"datasets: {source.path} has a column {min(taken)}, a name that the trainer needs: `columns: {{ours: theirs}}` renames"
        )
    if not any(needed <= set(rows.column_names) for needed in NEEDS[kind]):
        wanted = ", or ".join(" and ".join(sorted(needed)) for needed in NEEDS[kind])
        raise UserError(
            f"datasets: {source.path} has the columns {', '.join(rows.column_names)}; needed: {wanted}. "
            "`columns: {ours: theirs}` renames them"
        )
    return rows
