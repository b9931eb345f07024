"""Answers written by vLLM. Not run by this project's tests: it needs a GPU."""

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from llm_recipes.config import EvaluationConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation.model import Model, Sampling


class VllmModel(Model):
    """`Model` whose answers come from vLLM, which spreads over this machine's GPUs itself."""

    def __init__(self, model, tokenizer, config: EvaluationConfig, path: str):
        super().__init__(model, tokenizer, config.max_batch_tokens)
        self.llm = LLM(
            path, revision=config.model_revision, dtype=str(model.dtype).removeprefix("torch."), seed=config.seed,
            tensor_parallel_size=torch.cuda.device_count(), max_model_len=self.context,
        )  # fmt: skip

    def loglikelihoods(self, requests):
        raise UserError("backend: vllm writes answers and scores no choices: use backend: transformers for these tasks")

    def generate(self, prompts, stop, max_new_tokens, sampling=Sampling(), uniforms=None) -> list[list[int]]:  # noqa: B008
        """As `Model.generate`; a sampled answer has a seed of its own."""
        options = [
            SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=max_new_tokens, stop=list(stop),
                stop_token_ids=sorted(self.ends(stop)), include_stop_str_in_output=True,
                seed=None if uniforms is None else int(uniforms(i)[0] * 2**31),
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        found = self.llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], options, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in found]
