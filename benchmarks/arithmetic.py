"""What `builtin:arithmetic` is like: rows per second and characters of every view, and what train and test share.

    python benchmarks/arithmetic.py [--rows 100000] [--difficulty 1 2 3]

Rows per second are of one core, in a process where the numbers of the difficulty are known already; finding them takes
the seconds in the heading. `numbers` is the share of test problems whose numbers, under another wording, occur in as
many training problems as `--rows`.
"""

import argparse
import json
import statistics
import time
from itertools import islice

from llm_recipes.arithmetic import FAMILIES, LIMITS, VIEWS, generate, numbers_of, overlap, problems

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=100_000)
parser.add_argument("--difficulty", type=int, nargs="+", default=list(LIMITS))
args = parser.parse_args()


def characters(value) -> int:
    """Of all texts in a cell: a string, or a list of messages."""
    return len(value) if isinstance(value, str) else sum(len(message["content"]) for message in value)


for difficulty in args.difficulty:
    families = [family for family in FAMILIES if family.level <= difficulty]
    began = time.perf_counter()
    cells = sum(len(f.wordings) * sum(map(len, numbers_of(f, difficulty))) for f in families)
    seconds = time.perf_counter() - began
    print(f"difficulty {difficulty}: {len(families)} families, {cells:,} cells, found in {seconds:.1f} s")
    for view in VIEWS:
        began = time.perf_counter()
        rows = generate(view, args.rows, difficulty=difficulty)
        seconds = time.perf_counter() - began
        means = {column: statistics.mean(map(characters, values)) for column, values in rows.items()}
        print(
            f"  {view:10} {args.rows / seconds:8,.0f} rows/s  characters:", {k: round(v, 1) for k, v in means.items()}
        )
    stream = problems("test", difficulty=difficulty, split="test")
    report = overlap(islice(problems("sft", difficulty=difficulty), args.rows), islice(stream, 1000))
    print("  overlap of sft with 1,000 test problems:", json.dumps(report))
