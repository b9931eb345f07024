"""LoRA between stages: a folder with an adapter serves wherever one with a whole model does."""

import importlib.util
import json
from pathlib import Path

import torch
import trl
import xxhash
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.utils import find_adapter_config_file

from llm_recipes._compat import no_deepspeed
from llm_recipes.config import AdapterConfig, check_local
from llm_recipes.datasets import built_once, hasher
from llm_recipes.errors import UserError
from llm_recipes.metrics import meta_model


def weights_digest(name: str | None, revision: str = "main") -> str | None:
    """Of the model or adapter in a folder: its weights and configs, of large files 64 MB evenly spread; of a Hub id its name."""
    if name is None or not Path(name).is_dir():
        return name and hasher(name, revision)
    digest = xxhash.xxh3_128()
    for path in sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(min(1 << 20, size // 64 + 1)))
    return digest.hexdigest()


def whole_model(name: str, revision: str = "main", key: str = "model_name_or_path") -> str:
    """`name`, given as `key`, or for an adapter a folder in the cache with its base and it merged; adapters on adapters too."""
    name = check_local(key, name)
    if find_adapter_config_file(name, revision=revision) is None:
        return name
    adapter = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    base, base_revision = _base(adapter)
    key = hasher(weights_digest(adapter), weights_digest(base, base_revision))
    return str(built_once(f"merged-{key}", lambda folder: merge(adapter, folder)))


def _base(adapter: str | Path) -> tuple[str, str]:
    """(whole model, revision) that the adapter in a folder was trained on."""
    keys = json.loads((Path(adapter) / "adapter_config.json").read_text())
    revision = keys.get("revision") or "main"
    return whole_model(keys["base_model_name_or_path"], revision), revision


def merge(adapter: str | Path, folder: str | Path) -> None:
    """Writes to `folder` the adapter's base with it merged in, in fp32, and the adapter's tokenizer."""
    adapter, (base, revision) = Path(adapter), _base(adapter)
    task = json.loads((adapter / "adapter_config.json").read_text())["task_type"]
    auto, options = AutoModelForCausalLM, {}
    if task == "SEQ_CLS":
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    own = any(adapter.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(adapter if own else base, revision=None if own else revision)
    with no_deepspeed():  # ZeRO-3 would load nothing but shards
        model = auto.from_pretrained(base, revision=revision, dtype=torch.float32, **options)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.config.pad_token_id = tokenizer.pad_token_id
    if (adapter / "generation_config.json").is_file():  # knows where answers end, which the base may not
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lora_config(model: trl.ModelConfig, config: PreTrainedConfig, untrained: bool = False) -> LoraConfig | None:
    """PEFT's configuration from the lora_* keys, None without use_peft.

    A score head is trained too. So are the embeddings where the model has never seen the tokens of a turn
    (`untrained`): it cannot tell the end of a turn from the other spare tokens, which no adapter mends.
    """
    if not model.use_peft:
        return None
    scored = config.architectures[0].endswith("ForSequenceClassification")
    model.lora_task_type = "SEQ_CLS" if scored else "CAUSAL_LM"
    lora = trl.get_peft_config(model)
    lora.revision = model.model_revision
    whole = set(lora.modules_to_save or []) | ({"score"} if scored else set())
    if untrained:
        built = meta_model(config)
        ends = [built.get_input_embeddings(), None if config.tie_word_embeddings else built.get_output_embeddings()]
        whole |= {name.rsplit(".", 1)[-1] for name, module in built.named_modules() if any(module is e for e in ends)}
        lora.ensure_weight_tying = config.tie_word_embeddings
    lora.modules_to_save = sorted(whole) or None
    return lora


def trained_parameters(config: PreTrainedConfig, peft_config: LoraConfig | None) -> int | None:
    """Parameters that are trained with an adapter, None without one. Raises UserError for modules that are not there."""
    if peft_config is None:
        return None
    try:
        with torch.device("meta"):
            return get_peft_model(meta_model(config), peft_config).get_nb_trainable_parameters()[0]
    except ValueError as error:
        raise UserError(f"lora_*: peft refuses them: {' '.join(str(error).split())[:300]}") from error


def adapter_problems(model: trl.ModelConfig, adapter: AdapterConfig, args) -> list[str]:
    """Why the keys of the adapter cannot work here."""
    problems, given = [], [key for key in ("load_in_4bit", "load_in_8bit") if getattr(model, key)]
    if given and args.device.type == "cpu":
        problems.append(f"{given[0]} needs an NVIDIA GPU: bitsandbytes' kernels are not made for training on the CPU")
    elif given and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"{given[0]}: bitsandbytes is not installed: pip install -e '.[gpu]'")
    if model.dtype != "float32" and not model.use_peft:
        problems.append(
            f"dtype: {model.dtype} trains without fp32 weights and loses small updates: leave it out, and set bf16: true"
        )
    if given and not model.use_peft:
        problems.append(f"{given[0]} freezes the weights: set use_peft: true to have something to train")
    if adapter.merge and not model.use_peft:
        problems.append("merge: true needs an adapter: set use_peft: true")
    return problems
