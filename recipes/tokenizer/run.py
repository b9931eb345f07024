"""Train a byte-level BPE tokenizer.

    python recipes/tokenizer/run.py
    python recipes/tokenizer/run.py --vocab_size 32768 --datasets '[{path: my_corpus/}]' --output_dir outputs/tokenizer-32k

Then set `tokenizer_name_or_path: outputs/tokenizer` in the YAML of a model. One process is enough.
"""

import os
import time

from llm_recipes import outputs
from llm_recipes.config import DataConfig, TokenizerTrainingConfig, parse
from llm_recipes.datasets import fingerprint, load_documents, texts
from llm_recipes.errors import UserError, entrypoint
from llm_recipes.preflight import hub_problems
from llm_recipes.tokenization import quality, train_tokenizer


@entrypoint
def main():
    # 1. Config
    args, data = parse(TokenizerTrainingConfig, DataConfig, script=__file__)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a tokenizer is trained by one process: python recipes/tokenizer/run.py")

    # 2. Data, with some documents held out to measure on, and every check
    documents = load_documents(data, args.seed)
    record = outputs.describe(args.resolved, {"data": [fingerprint(part.train) for part in documents]})
    problems = outputs.output_problems(args.output_dir, record) + (hub_problems(args) if args.push_to_hub else [])
    if problems:
        raise UserError("\n".join(problems))
    if args.dry_run:
        return
    outputs.claim(args, args.push_to_hub, record)

    # 3. Train
    started = time.perf_counter()
    tokenizer = train_tokenizer((row for part in documents for row in part.train), args.vocab_size)
    seconds = time.perf_counter() - started

    # 4. Save first, then measure and show
    tokenizer.save_pretrained(args.output_dir)
    held_out = [text for part in documents for text in texts(part.eval or [], part.source.path)]
    results = {"vocab_size": len(tokenizer), "training_seconds": seconds} | quality(tokenizer, held_out)
    sentence = "A byte-level BPE tokenizer; single digits, document end `<|endoftext|>`, spare ids for chat."
    outputs.write_results(args.output_dir, record, results, sentence)

    # 5. Push last: a failure there loses nothing
    if args.push_to_hub:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
