"""What each rank of a large run would hold, without the machine: the real plans on models without memory.

    python recipes/plan/simulate.py                                      # 8B, 70B, 405B and a mixture of experts
    python recipes/plan/simulate.py --model_name_or_path 405B --ranks 16384 --pp 16 --tp 8
    python recipes/plan/simulate.py --model_name_or_path outputs/pretrain --ranks 64 --zero 2

One process takes the place of one rank after another in a process group of the real size that sends nothing. There it splits
the model as training does, pipeline stages, transformers' own tensor and expert parallel plans and FSDP2, and counts what is
left: weights, gradients and AdamW's two moments, in fp32. Activations and buffers come on top. Parts of a sequence (cp, sp)
share out the states as dp_shard does: give the product.
"""

import argparse
import dataclasses
import json
import re
import time
from collections import Counter
from math import ceil
from pathlib import Path

import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedConfig

from llm_recipes.config import ModelConfig
from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.results import markdown
from llm_recipes.launch import Layout
from llm_recipes.metrics import meta_model
from llm_recipes.pipeline.sharding import device_mesh, shard
from llm_recipes.pipeline.stages import part_names, split
from llm_recipes.preflight import architecture

SIZES = ("pp", "dp_replicate", "dp_shard", "tp", "ep")
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
MODELS = {  # Llama 3.1: Grattafiori et al. 2024, table 3. Mixtral 8x7B: Jiang et al. 2024, table 1
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": LLAMA | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "8x7B": {"model_type": "mixtral", "num_key_value_heads": 8},
}  # fmt: skip
DEFAULT = [  # model, pp, dp_replicate, dp_shard, tp, ep, ZeRO stage
    ("8B", 1, 1, 8, 1, 1, 1), ("8B", 1, 1, 8, 1, 1, 2), ("8B", 1, 1, 8, 1, 1, 3), ("8B", 1, 1, 8, 1, 1, 0),
    ("8B", 1, 1, 1, 8, 1, 0), ("8B", 2, 1, 4, 1, 1, 0), ("8B", 1, 8, 8, 1, 1, 0), ("8B", 1, 1, 512, 8, 1, 0),
    ("70B", 1, 1, 64, 1, 1, 0), ("70B", 1, 1, 128, 8, 1, 0), ("70B", 4, 1, 32, 8, 1, 0),
    ("405B", 1, 1, 1024, 1, 1, 0), ("405B", 16, 1, 8, 8, 1, 0), ("405B", 1, 16, 128, 8, 1, 0),
    ("405B", 16, 1, 128, 8, 1, 0),
    ("8x7B", 1, 1, 8, 1, 8, 0), ("8x7B", 1, 1, 4, 2, 8, 0), ("8x7B", 1, 1, 16, 1, 8, 0),
]  # fmt: skip


def hold(config: PreTrainedConfig, ways: Layout, rank: int) -> tuple[int, Counter]:
    """Parameters on `rank`, and by how many each cause makes them more than total / shards."""
    model = meta_model(config)
    total = {name: p.numel() for name, p in model.named_parameters()}
    dist.init_process_group("fake", rank=rank, world_size=ways.size)
    try:
        shard(model, ways, device_mesh(ways, "cpu"), "1F1B")  # another schedule moves stages to other ranks
        whole = {name: p.numel() for name, p in model.named_parameters()}
        local = {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in model.named_parameters()}
    except ValueError as error:  # no plan for this model, experts that do not divide
        raise UserError(f"{config.model_type}: {error}") from error
    finally:
        dist.destroy_process_group()
    causes, layer = Counter(), re.compile(r".*\.(\d+)\.")
    layers = len({found[1] for name in whole if (found := layer.match(name))})
    for name in total | whole:  # a head that is tied to the embedding is there twice where the stages are two
        place = "embedding on the first stage" if "embed" in name else "head on the last stage"
        place = f"{layers} of {config.num_hidden_layers} layers" if layer.match(name) else place
        causes[place] += (whole.get(name, 0) - total.get(name, 0) / ways.pp) / (ways.dp_shard * ways.tp)
        uneven = f"{layer.sub('', name)} not split evenly"
        causes[uneven] += local.get(name, 0) - whole.get(name, 0) / (ways.dp_shard * ways.tp)
    return sum(local.values()), causes


def states(rank: int, part: float, total: int, zero: int) -> dict:
    """Bytes of the states of `part` parameters out of `total`. ZeRO-1 splits those of AdamW alone, ZeRO-2 gradients too.

    DeepSpeed trains a copy of the weights, of fp32 ones as well, and keeps it with them.
    """
    found = {
        "weights": 4 * (total if zero in (1, 2) else part),
        "gradients": 4 * (total if zero == 1 else part),
        "optimizer": (12 if zero else 8) * part,
    }
    return {"rank": rank, **found, "total": sum(found.values())}


def simulate(name: str, config: PreTrainedConfig, ways: Layout, zero: int) -> dict:
    """A row of the table: bytes on the first, the last and the heaviest rank and by formula, and what makes the difference."""
    shape = meta_model(config)
    each = [p.numel() for p in shape.parameters()]
    total, last = sum(each), ways.size - 1
    if zero:
        # All parameters as one, padded to twice the ranks; under ZeRO-3 each for itself, padded to the ranks (DeepSpeed,
        # runtime/zero/stage_1_and_2.py and partition_parameters.py).
        part = sum(ceil(n / ways.size) for n in each) if zero == 3 else 2 * ceil(total / (2 * ways.size))
        held = dict.fromkeys((0, last), (part, Counter()))
    else:
        # What does not divide goes to the first ranks of a stage, and stages of equal layers are alike but for the ends.
        alike = {(): 0}
        for stage, layers in enumerate(split(shape, ways.pp) if ways.pp > 1 else ()):
            modules = shape.base_model.get_submodule(part_names(config)[1])[layers.start : layers.stop]
            kind = stage == 0, stage == ways.pp - 1, *(p.shape for p in modules.parameters())
            alike.setdefault(kind, stage * (ways.size // ways.pp))
        held = {rank: hold(config, ways, rank) for rank in sorted({*alike.values(), last})}
    row = {"model": name, "ranks": ways.size, **{size: getattr(ways, size) for size in SIZES}, "zero": zero}
    row |= {"parameters": total, "formula": states(0, total / ways.shards, total, zero)["total"]}
    for key, rank in {"first": 0, "last": last, "heaviest": max(held, key=lambda rank: held[rank][0])}.items():
        row[key] = states(rank, held[rank][0], total, zero)
        row[key]["difference"] = row[key]["total"] / row["formula"] - 1
        row[key]["causes"] = {cause: n * ways.shards / total for cause, n in held[rank][1].items() if n}
    return row


def line(row: dict) -> list[str]:
    """Cells of the table: GiB on the heaviest rank, the differences, and for those above 1 % their greatest causes."""
    why, figures = {}, [row["heaviest"][key] for key in ("weights", "gradients", "optimizer", "total")]
    strategy = f"ZeRO-{row['zero']}" if row["zero"] else " x ".join(str(row[size]) for size in SIZES)
    gib = [f"{n / 2**30:.4g}" for n in (*figures, row["formula"])]
    for found in row["heaviest"], row["first"], row["last"]:
        if abs(found["difference"]) > 0.01:
            causes = sorted(found["causes"].items(), key=lambda cause: -abs(cause[1]))[:3]
            why[found["rank"]] = ", ".join(f"{share:+.1%} {cause}" for cause, share in causes if abs(share) > 0.001)
    apart = [f"{row[key]['difference']:+.1%}" for key in ("first", "last", "heaviest")]
    causes = "; ".join(f"rank {rank}: {said}" for rank, said in why.items())
    return [row["model"], f"{row['ranks']:,}", strategy, *gib, *apart, causes]


def asked(args: argparse.Namespace) -> tuple:
    """Model, configuration, layout and ZeRO stage of the command line. Raises UserError where that cannot be trained."""
    given = {key: getattr(args, key) for key in ("ranks", *SIZES) if getattr(args, key) is not None}
    for key, size in given.items():
        if size < 1:
            raise UserError(f"--{key} must be at least 1, got {size}")
    ways = Layout(**{size: given[size] for size in SIZES if size in given})
    if args.ranks and args.dp_shard is None:  # those that are left
        ways = dataclasses.replace(ways, dp_shard=max(args.ranks // ways.size, 1))
    if args.ranks not in (None, ways.size):
        sizes = " x ".join(f"{size} {getattr(ways, size)}" for size in SIZES[:-1])
        raise UserError(f"{sizes} is {ways.size} ranks, and --ranks says {args.ranks}")
    name = args.model_name_or_path
    if name in MODELS:
        config = AutoConfig.for_model(**MODELS[name])
    elif "/" in name or Path(name).is_dir():
        config = architecture(ModelConfig(model_name_or_path=name), None)
    else:
        raise UserError(f"--model_name_or_path {name}: there is no such folder; known are {', '.join(MODELS)}")
    for kind in "attention", "key_value":
        if (heads := getattr(config, f"num_{kind}_heads", None)) and heads % ways.tp:
            raise UserError(f"--tp {ways.tp} does not divide the {heads} {kind} heads of {name}")
    if ways.pp > 1 and not config.base_model_pp_plan:
        raise UserError(f"--pp: transformers has no pipeline plan for {config.model_type}")
    if ways.pp > config.num_hidden_layers:
        raise UserError(f"--pp {ways.pp}: {name} has {config.num_hidden_layers} layers, and every stage needs one")
    if ways.ep > 1 and (ways.pp > 1 or ways.ep % ways.tp or ways.dp_shard * ways.tp % ways.ep):
        raise UserError(f"--ep {ways.ep} must be a multiple of tp and divide dp_shard x tp, and goes without pp")
    if args.zero and ways.dp_shard != ways.size:
        raise UserError("--zero: DeepSpeed splits over all ranks: give --ranks and no other size")
    return name, config, ways, args.zero or 0


@entrypoint
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--ranks", type=int, help="dp_shard is what the other sizes leave of them")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed's stage, in the place of FSDP2")
    parser.add_argument("--output_json", type=Path, help="every figure of the table, in bytes")
    args = parser.parse_args()
    if args.output_json and not args.output_json.absolute().parent.is_dir():
        raise UserError(f"--output_json {args.output_json}: there is no such folder")
    if args.model_name_or_path:
        layouts = [asked(args)]
    elif any(value is not None for key, value in vars(args).items() if key != "output_json"):
        raise UserError(f"a layout of what? --model_name_or_path is one of {', '.join(MODELS)}, or a folder")
    else:
        layouts = [
            (name, AutoConfig.for_model(**MODELS[name]), Layout(**dict(zip(SIZES, sizes, strict=True))), zero)
            for name, *sizes, zero in DEFAULT
        ]
    transformers.logging.set_verbosity_error()  # a stage lacks parts that the plans name, and it warns of each
    started = time.perf_counter()
    rows = [simulate(*layout) for layout in layouts]
    head = ["model", "ranks", " x ".join(SIZES), "weights", "gradients", "AdamW", "sum (GiB)", "formula"]
    print(markdown([*head, "first rank", "last", "heaviest", "causes"], [line(row) for row in rows]))
    print(f"\nGiB of the heaviest rank, and how far ranks are from the formula. {time.perf_counter() - started:.1f} s")
    if args.output_json:
        args.output_json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
