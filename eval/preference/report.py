"""Win rates, Bradley-Terry scores, agreement and ratings from the votes on the sheets.

    python eval/preference/report.py --sheets outputs/preference [--judge outputs/preference/judge.jsonl]

Prints tables and writes report.json beside the sheets. docs/preference.md says how each figure is computed.
"""

import argparse
import json
from pathlib import Path

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.preference import make_report, read_jsonl, read_key, read_votes, write


def figure(value: float | None, ends: list[float] | None, scale: float = 100, digits: int = 1) -> str:
    if value is None:
        return "-"
    interval = f" [{scale * ends[0]:.{digits}f}, {scale * ends[1]:.{digits}f}]" if ends else " [no interval]"
    return f"{scale * value:.{digits}f}{interval}"


def table(head: str, rows: list[list]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def comparison(found: dict) -> str:
    pairs = [
        [p["a"], p["b"], p["votes"], f"{p['wins']} / {p['ties']} / {p['both_bad']} / {p['losses']}",
         figure(p["win_rate"], p["ci95"]), f"{p['sign_test_p']:.3g}", figure(p["lc_win_rate"], p["lc_ci95"]),
         "-" if p["alpha"] is None else f"{p['alpha']:.2f}"]
        for p in found["pairs"]
    ]  # fmt: skip
    head = "a | b | votes | a / tie / both bad / b | win rate of a, % | p | length-controlled, % | alpha"
    scores = [[row["model"], figure(row["score"], row["ci95"], 1, 0)] for row in found["bradley_terry"]["scores"]]
    return table(head, pairs) + "\n" + table("model | Bradley-Terry", scores)


def share(found: dict) -> str:
    return f"{figure(found['share'], found['ci95'])} % of {found['n']}"


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sheets", default="outputs/preference", help="folder of sheets.py")
    parser.add_argument("--judge", help="judge.jsonl of judge.py")
    args = parser.parse_args()

    key = read_key(args.sheets)
    votes, judged = read_votes(args.sheets, key), read_jsonl(args.judge) if args.judge else []
    if not votes and not judged:
        raise UserError(f"{args.sheets} has no votes yet: see eval/preference/page.py, or give --judge")
    if unknown := {row.get("item") for row in judged} - {item["item"] for item in key["items"]}:
        raise UserError(f"{args.judge} judges {len(unknown)} items that are not in {args.sheets}")
    report = make_report(key, votes, judged)
    write(Path(args.sheets, "report.json"), json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    for rater, found in report["raters"].items():
        print(f"{rater}: {found['votes']} of {report['items']} items, left wins {share(found['left_wins'])}")
    for entry in report["identical"]:
        print(f"{' | '.join(entry['models'])}: {entry['count']} identical answers, not judged")
    if votes:
        print(f"left wins {share(report['left_wins'])} decided votes\n\n{comparison(report)}")
        ratings = report["ratings"]
        rows = [
            [model, quality, figure(r["mean"], r["ci95"], 1, 2), figure(r["share_4_or_5"], r["share_4_or_5_ci95"]), r["n"]]
            for model, qualities in ratings["models"].items()
            for quality, r in qualities.items()
        ]  # fmt: skip
        if rows:
            print(table("model | quality | mean of 1 to 5 | 4 or 5, % | ratings", rows))
            for quality, found in ratings["alpha"].items():
                alpha = "not defined" if found["alpha"] is None else f"{found['alpha']:.2f}"
                print(f"{quality}: ordinal alpha {alpha} on {found['units']} answers rated twice or more")
    if judged:
        found = report["judge"]
        print(
            f"\njudge {found['name']}, {found['items']} items in both orders, {found['no_answer']} replies were no answer"
        )
        print(f"same answer in both orders {share(found['position_consistency'])} items")
        print(f"the answer shown first wins {share(found['first_shown_wins'])} replies")
        print(f"agrees with the raters' majority {share(found['agreement_with_raters'])} items\n\n{comparison(found)}")
    print(f"written: {Path(args.sheets, 'report.json')}")


if __name__ == "__main__":
    main()
