"""Reward functions for PPO: reward models that read what they were trained to read, and rewards that can be checked."""

import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from llm_recipes._compat import no_deepspeed
from llm_recipes.adapters import whole_model
from llm_recipes.arithmetic import final_answer, is_correct
from llm_recipes.config import Reward, RewardsConfig
from llm_recipes.conversations import Encoder, Unusable
from llm_recipes.errors import RecipeExit, UserError
from llm_recipes.models import check_context
from llm_recipes.reward import score

EXACT_MATCH = "builtin:exact_match"


class RewardModel:
    """The score of a sequence classifier with one label, of prompt and answer: a reward function of the trainer.

    With the vocabulary and chat template of the policy's `tokenizer` it reads the very ids, the end of turn among them.
    With others it reads the conversation in its own template, cut answers as if they had ended, or plain text with its own
    EOS where the answer ended. Whole on every process, in `dtype`, loaded when it is first needed. Raises UserError for
    what is no such model.
    """

    def __init__(
        self, reward: Reward, tokenizer: PreTrainedTokenizerFast, normalize: bool = True, batch_size: int = 32,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.path, self.revision = reward.path, reward.revision
        self.__name__, self.said = Path(self.path).name, f"rewards: {self.path}"
        self.batch_size, self.device, self.dtype, self.policy_eos = batch_size, device, dtype, tokenizer.eos_token_id
        self.name = whole_model(self.path, self.revision, "rewards")
        try:
            self.config = AutoConfig.from_pretrained(self.name, revision=self.revision)
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.said}: {str(error).splitlines()[0]}") from error
        if self.config.num_labels != 1:
            raise UserError(f"{self.said} is no reward model: it has {self.config.num_labels} labels, not one score")
        text = self.config.get_text_config()
        if text.pad_token_id is None:  # the score is read at the last other token
            text.pad_token_id = self.tokenizer.pad_token_id
        if text.pad_token_id is None:
            raise UserError(f"{self.said} has no padding token")
        self.same = _languages(self.tokenizer) == _languages(tokenizer)
        # Ours learn up to the end of turn, others with what their template writes after it.
        self.ours = hasattr(self.config, "score_mean")
        self.mean, self.std = (self.config.score_mean, self.config.score_std) if normalize and self.ours else (0.0, 1.0)
        if not self.std > 0:
            raise UserError(
                f"{self.said}: score_std is {self.std}: set normalize_scores: false to take its scores as they are"
            )

    @cached_property
    def model(self):
        try:
            with no_deepspeed():  # ZeRO-3 would load nothing but shards
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    self.name, revision=self.revision, config=self.config, dtype=self.dtype, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.said}: {str(error).splitlines()[0]}") from error
        if missing := sorted(info["missing_keys"]):  # transformers would draw them anew
            raise UserError(f"{self.said} has no weights for {', '.join(missing[:3])}")
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def encoder(self) -> Encoder:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.said} has no chat template, and no vocabulary in common with the policy's conversations"
            )
        self.tokenizer.pad_token = None  # padding is what the model's config says
        try:
            return Encoder(self.tokenizer)
        except UserError as error:
            raise UserError(f"{self.said}: {error}") from error

    def sequences(self, prompts, completions, prompt_ids, completion_ids) -> list[list[int]]:
        """Ids of each prompt with its answer, as the model reads them. Raises RecipeExit for what its template refuses."""
        if self.same:
            return [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        if isinstance(prompts[0], str):
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            read = self.tokenizer(texts, split_special_tokens=True)  # what somebody wrote stays text
            ends = [[self.tokenizer.eos_token_id] if ids[-1] == self.policy_eos else [] for ids in completion_ids]
            return [ids + end for ids, end in zip(read["input_ids"], ends, strict=True)]
        try:
            pieces = [self.encoder.pieces(p + c) for p, c in zip(prompts, completions, strict=True)]
        except Unusable as reason:
            raise RecipeExit(f"{self.said} cannot score all answers: some {reason}") from reason
        return [ids for ids, _ in self.encoder.encode(pieces, whole=not self.ours)]

    def __call__(self, prompts, completions, prompt_ids, completion_ids, **columns) -> list[float]:
        """Scores `(n,)` of the answers `completions`, texts or messages, to `prompts`, normalised.

        Raises RecipeExit for scores that are not finite and for sequences longer than the model reads.
        """
        sequences = self.sequences(prompts, completions, prompt_ids, completion_ids)
        context, longest = getattr(self.config, "max_position_embeddings", None), max(map(len, sequences))
        if context and longest > context:
            raise RecipeExit(f"{self.said} reads up to {context} tokens; a prompt with its answer has {longest}")
        scores = score(self.model, sequences, self.config.get_text_config().pad_token_id, self.batch_size)
        if not np.isfinite(scores).all():
            raise RecipeExit(f"{self.said}: {(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
        return ((scores - self.mean) / self.std).tolist()

    def __str__(self) -> str:
        how = f"less {self.mean:.4g}, over {self.std:.4g}" if (self.mean, self.std) != (0.0, 1.0) else "as it is"
        return f"{self.path}: {how}, {'the ids of the policy' if self.same else 'with its own tokenizer'}"


def _languages(tokenizer) -> tuple:
    return tokenizer.get_vocab(), tokenizer.chat_template


def exact_match(completions, answer=None, **columns) -> list[float]:
    """1 for each answer whose number after #### is that of the gold `answer`, else 0; gold ones have #### or are the number.

    Raises UserError without gold answers.
    """
    if answer is None:
        raise UserError(f"rewards: {EXACT_MATCH} needs a column `answer`; `columns: {{ours: theirs}}` renames")
    golds = [final_answer(str(gold)) or (re.fullmatch(r"-?[0-9.,]+", str(gold)) or [None])[0] for gold in answer]
    if None in golds:
        bad = answer[golds.index(None)]
        raise UserError(f"rewards: {EXACT_MATCH}: an `answer` has no number after ####: {str(bad)[-60:]!r}")
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(text, gold)) for text, gold in zip(texts, golds, strict=True)]


def load_rewards(
    config: RewardsConfig, tokenizer: PreTrainedTokenizerFast, rows: list[Dataset | None], longest: int = 0,
    batch_size: int = 32, device: torch.device | str = "cpu",
) -> tuple[list, list[float], list[str]]:  # fmt: skip
    """(reward functions, their weights, what each is in words) for `rows` of conversations, with answers of up to `longest`
    tokens. Raises UserError for what cannot reward them."""
    functions = []
    for reward in config.rewards:
        if reward.path.startswith("builtin:"):
            if reward.path != EXACT_MATCH:
                raise UserError(f"rewards: {reward.path} is not built in; there is {EXACT_MATCH}")
            functions.append(exact_match)
            for part in filter(None, rows):
                exact_match([""] * len(part), part["answer"] if "answer" in part.column_names else None)
        else:
            model = RewardModel(reward, tokenizer, config.normalize_scores, batch_size, device)
            _ = model.same or model.encoder  # refused now, rather than after the first answers
            if model.same:
                check_context(model.said, model.config, longest)
            functions.append(model)
    names = [function.__name__ for function in functions]
    if not names:
        raise UserError("rewards: the list is empty")
    if len(set(names)) < len(names):
        raise UserError(f"rewards: two are called {max(names, key=names.count)}, and so would be their figures")
    weights = [reward.weight for reward in config.rewards]
    said = [f"{w:g} x {EXACT_MATCH if f is exact_match else f}" for f, w in zip(functions, weights, strict=True)]
    return functions, weights, said
