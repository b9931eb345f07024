"""PPOTrainer: rollouts by the policy, scores, advantages from a learnt critic, and clipped updates.

What is trained on follows from (seed, number of the rollout) and the weights, on any number of processes: each completion
is drawn with random numbers of its own, and every process holds the whole rollout, a few numbers a token.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, TrainerCallback

from llm_recipes.answers import generate
from llm_recipes.batches import Examples
from llm_recipes.config import Reward
from llm_recipes.errors import UserError
from llm_recipes.models import load_trained, trained_config
from llm_recipes.ppo import math
from llm_recipes.ppo._trl_compat import RolloutTrainer, disable_dropout_in_model, get_config_model_id, use_adapter
from llm_recipes.ppo.config import PPOConfig
from llm_recipes.ppo.critic import SeparateCritic, SharedCritic
from llm_recipes.ppo.reward_scoring import RewardModel

STATE, DRAW = "ppo_state.json", "draw"


class Head:
    """Makes the output layer of a causal LM see only the places asked for, `(B, L)`, and keeps its input there.

    The vocabulary is then spread over the tokens of completions alone, neither prompts nor padding; what a model does to its
    logits afterwards (scale, soft cap) it still does.
    """

    def __init__(self, model):
        self.places = self.hidden = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module, inputs):
        if self.places is None:
            return None
        self.hidden = inputs[0][self.places]
        return (self.hidden[None], *inputs[1:])

    def logits(self, model, input_ids: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(n, V)` of the `n` next tokens, and the hidden states `(n, H)` before them."""
        self.places = places
        try:
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
            return logits, self.hidden
        finally:
            self.places = self.hidden = None


class Rollout:
    """Completions with all that is known of them: attributes are tensors of N rows, on the device.

    Rows are prompt and completion without a gap, padded on the right. So no attention mask is needed, positions count from
    the first token for every model, and what is a token follows from lengths rather than ids.
    """

    def __init__(self, **columns: torch.Tensor):
        self.columns = columns

    def __getattr__(self, name):
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def rows(self, index) -> "Rollout":
        """Some rows, cut to the longest of them."""
        some = {name: column[index] for name, column in self.columns.items()}
        width, tokens = int((some["prompt_lengths"] + some["lengths"]).max()), int(some["lengths"].max())
        for name, column in some.items():
            if column.dim() == 2:
                some[name] = column[:, : width if name == "input_ids" else tokens]
        return Rollout(**some)

    @property
    def mask(self) -> torch.Tensor:
        """`(N, C)`, true where a completion has a token."""
        width = int(self.lengths.max())
        return torch.arange(width, device=self.lengths.device) < self.lengths[:, None]

    @property
    def places(self) -> torch.Tensor:
        """`(N, L)`, true at the tokens before those of the completion."""
        at = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        first = (self.prompt_lengths - 1)[:, None]
        return (at >= first) & (at < first + self.lengths[:, None])

    @property
    def targets(self) -> torch.Tensor:
        """Ids `(n,)` of all completions, row by row."""
        return self.input_ids[:, 1:][self.places[:, :-1]]


class _WholeRollouts(TrainerCallback):
    """Saves and stops between rollouts only, where a resume continues exactly; starts the critic after the policy's engine."""

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer, self.every, self.save, self.stop = trainer, trainer.args.steps_per_rollout, False, False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.max_steps % self.every:
            raise UserError(
                f"num_train_epochs: the run has {state.max_steps} steps and a rollout {self.every}: set max_steps to a multiple of it"
            )
        self.trainer.critic.prepare(self.trainer)
        if self.trainer.resumed_from:
            self.trainer.load_state(self.trainer.resumed_from)

    def on_step_end(self, args, state, control, **kwargs):
        self.save, self.stop = self.save or control.should_save, self.stop or control.should_training_stop
        whole = state.global_step % self.every == 0
        control.should_save, control.should_training_stop = whole and self.save, whole and self.stop
        if whole:
            self.save = self.stop = False


def no_dropout(model) -> None:
    """With dropout the ratio of the first step would not be 1. TRL's function leaves that of the attention on."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class PPOTrainer(RolloutTrainer):
    """Proximal policy optimisation with a learnt critic (Ziegler et al. 2019; details after Huang et al. 2024).

    `reward_funcs` are reward models (a name, a folder, a model) or functions, async ones too, called with `prompts`,
    `completions`, `prompt_ids`, `completion_ids` and the other columns of the rows, that return a number or None for each
    completion; `args.reward_weights` weighs them. Rows have a `prompt`, text or messages, or `prompt_ids`, taken as they are.

    `critic_model` is a sequence classifier with one label; without it the critic starts from the policy's weights, with
    values of 0. With `critic_peft_config` it is trained by an adapter.

    The policy needs its name on disk or Hub (`config.name_or_path`): the reference is loaded from there, unless the
    policy is trained by an adapter.
    """

    def __init__(
        self, model, reward_funcs, args: PPOConfig | None = None, train_dataset: Dataset | None = None, eval_dataset=None,
        processing_class=None, critic_model: PreTrainedModel | str | None = None, peft_config=None, critic_peft_config=None,
        **kwargs,
    ):  # fmt: skip
        args = args or PPOConfig("ppo")
        if isinstance(eval_dataset, Dataset):  # each row is drawn with the same random numbers, wherever
            eval_dataset = eval_dataset.add_column(DRAW, list(range(len(eval_dataset))))
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        models = [i for i, func in enumerate(reward_funcs) if isinstance(func, str | PreTrainedModel)]
        functions = [(lambda **columns: None) if i in models else func for i, func in enumerate(reward_funcs)]
        super().__init__(
            model, functions, args, train_dataset, eval_dataset, processing_class, peft_config=peft_config, **kwargs
        )
        args, name = self.args, get_config_model_id(self.model.config)
        if not isinstance(train_dataset, Dataset):
            raise UserError("PPO takes its prompts by number: give a Dataset, not a stream")
        if self.aux_loss_enabled:
            raise UserError("PPO trains no balance loss of experts: set router_aux_loss_coef: 0")
        text = self.model.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            text.output_router_logits = False  # generate would compute the balance loss, and fail
        for i in models:
            given = reward_funcs[i]
            path = given if isinstance(given, str) else get_config_model_id(given.config)
            scorer = RewardModel(
                Reward(path), self.processing_class, batch_size=args.per_device_eval_batch_size, device=args.device
            )
            if path is not given:
                scorer.model = given.to(args.device).eval().requires_grad_(False)
            self.reward_funcs[i], self.reward_func_names[i] = scorer, scorer.__name__
        for policy in (self.model, self.ref_model):
            if policy is not None:
                no_dropout(policy)
        self.order = Examples(train_dataset, None, args.seed, True)
        self.head = Head(self.model)
        self.ref_head = None if self.ref_model is None else Head(self.accelerator.unwrap_model(self.ref_model))
        self.shared, self.kl_coef, self.resumed_from = args.critic == "shared", args.kl_coef, None
        if self.shared:
            if critic_model is not None or critic_peft_config is not None:
                raise UserError("critic: shared is a layer on the policy: a critic model has no place in it")
            self.critic = SharedCritic(self.model.config.get_text_config().hidden_size, args.device)
        else:
            if not isinstance(critic_model, PreTrainedModel):
                options = trl.ModelConfig(dtype=str(self.model.dtype).removeprefix("torch."))
                start, tokenizer = critic_model or name, self.processing_class
                critic_model = load_trained(
                    start, options, trained_config(start, options, tokenizer, "SEQ_CLS"), tokenizer
                )
            if args.gradient_checkpointing:
                critic_model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            if critic_peft_config is not None:
                critic_model = get_peft_model(critic_model, critic_peft_config)
            no_dropout(critic_model)  # that of adapters too
            self.critic = SeparateCritic(critic_model)
        self.rollout = self.number = None
        self.micro, self.sums, self.deviation = 0, {}, 0.0
        self.add_callback(_WholeRollouts(self))

    def train(self, *args, **kwargs):
        callbacks = self.callback_handler.callbacks
        callbacks.sort(key=lambda callback: isinstance(callback, _WholeRollouts))  # the last has the last word
        return super().train(*args, **kwargs)

    # Rollout

    def rollouts_per_epoch(self) -> int:
        return max(len(self.train_dataset) * self.args.num_generations // self.args.rollout_size, 1)

    def prompts_of(self, number: int) -> list[dict]:
        """This process's rows of rollout `number`."""
        args, size = self.args, self.args.rollout_size // self.args.world_size
        first = number * args.rollout_size + args.process_index * size
        rows = [self.order.window(place // args.num_generations) for place in range(first, first + size)]
        return [self.train_dataset[row] for row in rows]

    def draw(self, rows: list[dict], keys: list[tuple[int, ...]]):
        """(prompt ids, completion ids, completions) of rows, each drawn with random numbers that follow from its key."""
        args = self.args
        prompts = (
            [row["prompt_ids"] for row in rows]
            if "prompt_ids" in rows[0]
            else self.tokenized([row["prompt"] for row in rows])
        )
        if args.use_vllm:
            ids = self.generate_with_vllm(prompts)
        else:
            drawn = [
                np.random.default_rng([args.seed, *key]).random(args.max_completion_length, np.float32) for key in keys
            ]
            with self.whole_policy() as policy:
                ids = generate(
                    policy, prompts, self.processing_class.pad_token_id, args.max_completion_length, batch_size=len(rows),
                    uniforms=torch.from_numpy(np.stack(drawn)), temperature=args.temperature, stop=self.eos_token_ids,
                    **{"cache_implementation": args.cache_implementation, **(args.generation_kwargs or {})},
                )  # fmt: skip
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if isinstance(rows[0].get("prompt"), list):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return prompts, ids, texts

    def logprobs(self, model, head: Head, part: Rollout, statistics: bool = False):
        """(logprobs `(n,)` of the completions' tokens at the temperature, hidden states, entropies if asked for)."""
        with self.accelerator.autocast():
            logits, hidden = head.logits(model, part.input_ids, part.places)
        logits = logits.float() / self.args.temperature if self.args.temperature != 1 else logits.float()
        logprobs = -torch.nn.functional.cross_entropy(logits, part.targets, reduction="none")
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1) if statistics else None
        return logprobs, hidden, entropy

    def plan(self, rollout: Rollout, number: int, epoch: int) -> list[list[torch.Tensor]]:
        """This process's micro-batches of every mini-batch, as row numbers: of like length, and on all processes too."""
        args = self.args
        order = np.random.default_rng([args.seed, 102, number, epoch]).permutation(args.rollout_size)
        lengths, plan = rollout.prompt_lengths + rollout.lengths, []
        for rows in torch.from_numpy(order).to(lengths.device).chunk(args.num_mini_batches):
            rows = rows[lengths[rows].argsort(stable=True)].reshape(
                -1, args.world_size, args.per_device_train_batch_size
            )
            plan.append(list(rows[:, args.process_index]))
        return plan

    def forward_all(self, rollout: Rollout, batches: list[torch.Tensor], compute) -> list[torch.Tensor]:
        """`compute(part)`, tensors `(n,)`, over the rows of all processes, each in its `batches`; as `(N, C)`."""
        results = None
        for rows in batches:
            part = rollout.rows(rows)
            found = compute(part)
            results = results or [torch.zeros(rollout.mask.shape, device=rows.device) for _ in found]
            for result, flat in zip(results, found, strict=True):
                piece = torch.zeros(part.mask.shape, device=rows.device)
                piece[part.mask] = flat.float()
                result[rows, : piece.shape[1]] = piece
        return [self.accelerator.reduce(result, "sum") for result in results]

    @torch.no_grad()
    def collect(self, rows: list[dict], keys: list[tuple[int, ...]], number: int | None = None):
        """(rollout, prompts, completions), the `number`-th to train on: the rollout is of all processes, the texts of this one."""
        accelerator, device, began = self.accelerator, self.accelerator.device, time.perf_counter()
        prompts, completions, texts = self.draw(rows, keys)
        drawn = time.perf_counter()
        said = [row.get("prompt") or self.processing_class.decode(ids) for row, ids in zip(rows, prompts, strict=True)]
        known = [row | {"prompt_ids": ids} for row, ids in zip(rows, prompts, strict=True)]
        rewards = self.rewards(known, said, texts, completions)  # of all processes
        whole = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
        local = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(whole, True, self.processing_class.pad_token_id),
            "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
            "lengths": torch.tensor([len(ids) for ids in completions]),
            "ended": torch.tensor([int(ids[-1] in self.eos_token_ids) for ids in completions]),
        }
        gathered = {
            name: accelerator.gather(accelerator.pad_across_processes(column.to(device), dim=1))
            for name, column in local.items()
        }
        scores = (rewards * self.reward_weights.to(device)).nansum(1)
        rollout = Rollout(**gathered, rewards=rewards, scored=~rewards.isnan().all(1), scores=scores)
        scored = time.perf_counter()
        if number is None:
            order = (rollout.prompt_lengths + rollout.lengths).argsort(stable=True)
            batches = [order.reshape(self.args.world_size, -1)[self.args.process_index]]
        else:  # those of the first step, whose ratio is then 1 to the last bit
            batches = [rows for mini_batch in self.plan(rollout, number, 0) for rows in mini_batch]
        self.judge(rollout, batches, training=number is not None)
        self.metric("time/generate", drawn - began)
        self.metric("time/reward", scored - drawn)
        self.metric("time/forward", time.perf_counter() - scored)
        return rollout, said, texts

    def judge(self, rollout: Rollout, batches: list[torch.Tensor], training: bool) -> None:
        """Adds log-probs under policy and reference, entropies, and values, `(N, C)`, before the update."""

        def policy(part):
            logprobs, hidden, entropy = self.logprobs(self.model_wrapped, self.head, part, statistics=True)
            return [logprobs, entropy, *([self.critic.values(hidden)] if self.shared and training else [])]

        def reference(part):
            if self.ref_model is not None:
                return [self.logprobs(self.ref_model, self.ref_head, part)[0]]
            adapted = self.accelerator.unwrap_model(self.model)
            with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
                return [self.logprobs(self.model_wrapped, self.head, part)[0]]

        def critic(part):
            return [self.critic.values(part.input_ids, part.places)]

        found = self.forward_all(rollout, batches, policy)
        rollout.columns |= {"old_logprobs": found[0], "entropies": found[1]}
        if self.args.kl_coef:
            rollout.columns["ref_logprobs"] = self.forward_all(rollout, batches, reference)[0]
        if training:
            rollout.columns["values"] = found[2] if self.shared else self.forward_all(rollout, batches, critic)[0]

    def objective(self, rollout: Rollout) -> None:
        """Adds the scores that count and the KL, and logs the figures of a rollout, of all processes."""
        args, mask = self.args, rollout.mask
        scores = given = rollout.scores
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (1 - rollout.ended)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        score, lengths = scores[rollout.scored].mean(), rollout.lengths.float()
        figures = {
            "objective/score": score, "objective/kl_coef": self.kl_coef, "reward": given[rollout.scored].mean(),
            "objective/entropy": torch.where(mask, -rollout.old_logprobs, 0).sum(1).mean(),
            "policy/entropy": math.masked_mean(rollout.entropies, mask),
            "completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(), "completions/clipped_ratio": 1 - rollout.ended.float().mean(),
            "padding_fraction": 1 - (rollout.prompt_lengths + rollout.lengths).sum() / rollout.input_ids.numel(),
        }  # fmt: skip
        kl = torch.zeros_like(rollout.old_logprobs)
        if args.kl_coef:  # else there is no reference, and nothing to say
            kl = torch.where(mask, math.kl(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator), 0)
            total = kl.sum(1)[rollout.scored].mean()
            figures |= {
                "objective/kl": total, "objective/kl_per_token": math.masked_mean(kl, mask),
                "objective/non_score_reward": -self.kl_coef * total, "objective/rlhf_reward": score - self.kl_coef * total,
            }  # fmt: skip
        rollout.columns |= {"scores": scores, "kl": kl}
        for name, column in zip(self.reward_func_names, rollout.rewards.T, strict=True):
            found = column[~column.isnan()]
            if len(found):
                figures |= {f"rewards/{name}/mean": found.mean(), f"rewards/{name}/std": found.std(correction=0)}
        if not rollout.scored.all():
            figures["completions/unscored"] = (~rollout.scored).float().mean()
        for name, value in figures.items():
            self.metric(name, float(value), len(rollout))

    def begin_rollout(self, number: int) -> Rollout:
        """Rollout `number` with advantages and returns."""
        args, size = self.args, self.args.rollout_size // self.args.world_size
        keys = [(101, number, args.process_index * size + i) for i in range(size)]
        rollout, *self.texts = self.collect(self.prompts_of(number), keys, number)
        self.objective(rollout)
        self.state.num_input_tokens_seen += int((rollout.prompt_lengths + rollout.lengths).sum())
        mask = rollout.mask & rollout.scored[:, None]  # without any score there is nothing to learn from
        rewards = math.token_rewards(rollout.scores, rollout.kl, rollout.mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = math.whiten(rewards, mask, shift_mean=False)
        advantages, returns = math.gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam)
        for name, value in (
            ("critic/value", math.masked_mean(rollout.values, mask)), ("critic/return", math.masked_mean(returns, mask)),
            ("critic/explained_variance", math.explained_variance(rollout.values, returns, mask)),
        ):  # fmt: skip
            self.metric(name, float(value))
        # Whitened advantages have no scale, so the value loss must not: over the variance of the returns, or over what the
        # values are off by, where that is more.
        spread = math.masked_variance(returns, mask)
        error = math.masked_mean((returns - rollout.values) ** 2, mask)
        self.vf_coef = args.vf_coef / torch.maximum(spread, error).clamp(min=1e-8)
        if args.whiten_advantages:
            advantages = math.whiten(advantages, mask)
        rollout.columns |= {"advantages": advantages, "returns": returns, "counted": mask}
        sums = torch.where(mask, advantages, 0).sum(1) / mask.sum(1).clamp(min=1)
        self.log_table(*self.texts, rollout.rewards, sums.tolist())
        if args.kl_target is not None:
            kl = float(rollout.kl.sum(1)[rollout.scored].mean())
            self.kl_coef = math.adapted(self.kl_coef, kl, args.kl_target, args.kl_horizon, args.rollout_size)
        return rollout

    def next_micro_batch(self) -> dict:
        """What the next forward and backward of this process train on."""
        args = self.args
        number, step = divmod(self.state.global_step, args.steps_per_rollout)
        if self.number != number:
            self.rollout, self.number, self.micro = self.begin_rollout(number), number, 0
        epoch, mini_batch = divmod(step, args.num_mini_batches)
        if self.micro == 0:
            self.batches = self.plan(self.rollout, number, epoch)[mini_batch]
            tokens = self.accelerator.reduce(sum(self.rollout.counted[rows].sum() for rows in self.batches), "sum")
            self.share = args.world_size / tokens.clamp(min=1)  # DDP and the others average over the processes
        part = self.rollout.rows(self.batches[self.micro])
        self.micro = (self.micro + 1) % args.gradient_accumulation_steps
        return {"input_ids": part.input_ids, "part": part, "share": self.share, "number": number}

    # Update

    def loss(self, model, inputs: dict) -> torch.Tensor:
        """The policy's loss of a micro-batch, its share of the mean over all tokens of the step; a shared critic's with it."""
        part, share, args = inputs["part"], inputs["share"], self.args
        mask = part.mask
        counted, old = part.counted[mask], part.old_logprobs[mask]
        logprobs, hidden, _ = self.logprobs(model, self.head, part)
        ratio = math.ratio(logprobs, old)
        losses, clipped = math.policy_loss(ratio, part.advantages[mask], args.epsilon, args.epsilon_high)
        loss = torch.where(counted, losses, 0).sum() * share
        with torch.no_grad():
            deviation = torch.where(counted, (ratio - 1).abs(), 0)
            self.add_up(
                {"loss": losses, "ratio": ratio, "approxkl": (logprobs - old) ** 2 / 2, "clipfrac": clipped},
                "policy",
                counted,
                share,
            )
            self.deviation = max(self.deviation, deviation.max().item() if len(deviation) else 0.0)
        if inputs["number"] < args.critic_warmup_rollouts:
            loss = loss * 0
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0  # no weight decay either; the scheduler's next step puts it back
        self.current = inputs
        if self.shared:
            loss = loss + self.vf_coef * self.value_loss(self.critic.values(hidden))
        return loss

    def value_loss(self, values: torch.Tensor) -> torch.Tensor:
        """The critic's loss of the current micro-batch from its values `(n,)`."""
        part, share = self.current["part"], self.current["share"]
        mask = part.mask
        counted = part.counted[mask]
        losses, clipped = math.value_loss(values, part.values[mask], part.returns[mask], self.args.cliprange_value)
        self.add_up({"loss": losses.detach(), "clipfrac": clipped}, "critic", counted, share)
        return torch.where(counted, losses, 0).sum() * share

    def add_up(self, figures: dict[str, torch.Tensor], whose: str, counted: torch.Tensor, share: torch.Tensor) -> None:
        """Adds this micro-batch's share to the means over all tokens of the step."""
        for name, values in figures.items():
            part = torch.where(counted, values.float(), 0).sum() * share / self.args.world_size
            self.sums[f"{whose}/{name}"] = self.sums.get(f"{whose}/{name}", 0) + part

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        args, last = self.args, self.micro == 0
        done = self.lr_scheduler.get_last_lr()[0] / args.learning_rate if args.learning_rate else 1.0
        rate = done * (args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate)
        if self.shared:
            norm = self.critic.step(rate) if last else None
        else:
            part = self.current["part"]
            norm = self.critic.step(self.value_loss(self.critic.values(part.input_ids, part.places)), last, rate)
        if last:
            figures = torch.stack([*self.sums.values(), torch.tensor(self.deviation, device=args.device)])
            figures = self.accelerator.gather(figures[None])
            for name, value in zip(self.sums, figures.sum(0).tolist(), strict=False):
                self.metric(name, value)
            self.metric("policy/ratio_max_dev", figures[:, -1].max().item())
            self.metric("critic/grad_norm", norm)
            self.metric("critic/learning_rate", rate)
            self.sums, self.deviation = {}, 0.0
        self.current = None
        return loss

    # Evaluation

    def evaluate_prompts(self, rows: list[dict]) -> None:
        """Figures of held-out prompts, by the same random numbers each time."""
        keys = [(103, row.pop(DRAW)) for row in rows]
        self.objective(self.collect(rows, keys)[0])

    def samples(self, count: int = 3) -> list[str]:
        """Completions of the last rollout, this process's first ones, each with its rewards."""
        if self.rollout is None:
            return []
        first, found = self.args.process_index * len(self.texts[0]), []
        for i, (prompt, text) in enumerate(zip(*self.texts, strict=True)):
            if i == count:
                break
            asked, said = (part if isinstance(part, str) else part[-1]["content"] for part in (prompt, text))
            rewards = zip(self.reward_func_names, self.rollout.rewards[first + i].tolist(), strict=True)
            each = ", ".join(f"{name} {value:.3g}" for name, value in rewards)
            found.append(f"{asked}\n---- completion: score {self.rollout.scores[first + i]:.3g} ({each})\n{said}")
        return found

    # State beside the Trainer's

    def save_state(self, folder: str) -> None:
        """`critic/` and ppo_state.json in a checkpoint; every rank takes part."""
        critic = Path(folder) / "critic"
        critic.mkdir(parents=True, exist_ok=True)
        self.critic.save(critic)
        if self.args.process_index == 0:
            (Path(folder) / STATE).write_text(json.dumps({"kl_coef": self.kl_coef}) + "\n")

    def load_state(self, folder: str) -> None:
        self.critic.load(Path(folder) / "critic")
        self.kl_coef = json.loads((Path(folder) / STATE).read_text())["kl_coef"]
