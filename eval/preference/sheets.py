"""Blind sheets for raters from two or more models' answers to the same prompts.

    python eval/preference/sheets.py --runs outputs/eval/sft outputs/eval/dpo --raters alice bob

Each run is a folder of eval/run.py, or a jsonl with `prompt` and `answer`. Next: page.py, judge.py, report.py.
"""

import argparse
from pathlib import Path

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.preference import align, check_name, make_items, read_answers, write_sheets


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", nargs="+", required=True, help="two or more evaluation folders or jsonl files")
    parser.add_argument("--task", default="open_ended", help="which task of the folders")
    parser.add_argument("--raters", nargs="+", default=[], help="their names; none for a model judge alone")
    parser.add_argument("--seed", type=int, default=0, help="of the sides and the order")
    parser.add_argument("--output", default="outputs/preference")
    args = parser.parse_args()

    if len(args.runs) < 2 or len(set(args.runs)) < len(args.runs):
        raise UserError("--runs: give two or more, each once")
    if len({check_name(rater).casefold() for rater in args.raters}) < len(args.raters):
        raise UserError(
            "--raters: give each name once; names that differ by case alone share their files on some disks"
        )
    if Path(args.output, "key.json").exists():
        raise UserError(f"{args.output} has sheets, and maybe votes on them: choose another --output")
    runs = {}
    for run in args.runs:
        runs[run], more = read_answers(run, args.task)
        if more:
            print(f"{run}: {more} prompts have more than one output; the first is taken")
    aligned = align(runs)
    items, identical = make_items(aligned, args.raters, args.seed)
    for entry in identical:
        print(f"{' | '.join(entry['models'])}: {entry['count']} of {len(aligned)} answers are identical and left out")
    if not items:
        raise UserError("all answers are identical: there is nothing to compare")
    key = {"schema": 1, "seed": args.seed, "models": args.runs, "raters": args.raters, "identical": identical}
    write_sheets(args.output, key | {"items": items}, args.raters)
    print(f"{len(items)} items for {', '.join(args.raters) or 'a judge'} in {args.output}; key.json is not for raters")


if __name__ == "__main__":
    main()
