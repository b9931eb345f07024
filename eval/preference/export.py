"""Votes as preference pairs for recipes/dpo and recipes/rlhf/reward.

    python eval/preference/export.py --sheets outputs/preference --output preferences.jsonl
    python recipes/dpo/run.py --datasets '[{path: preferences.jsonl}]'

An item becomes a pair where more than half of its raters prefer the same answer.
"""

import argparse

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.preference import outcomes, preference_rows, read_key, read_votes
from llm_recipes.evaluation.results import check_output
from llm_recipes.evaluation.runs import write_lines


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sheets", default="outputs/preference", help="folder of sheets.py")
    parser.add_argument("--output", required=True, help="the jsonl to write")
    args = parser.parse_args()

    key, output = read_key(args.sheets), check_output(args.output)
    pairs, left_out = preference_rows(key, outcomes(key, read_votes(args.sheets, key)))
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    if not pairs:
        raise UserError(f"{args.sheets}: no item has a winner (left out: {reasons})")
    write_lines(output, pairs)
    print(f"{len(pairs)} of {len(key['items'])} items written to {output}; left out: {reasons}")


if __name__ == "__main__":
    main()
