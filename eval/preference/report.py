"""Win rates, Bradley-Terry scores, agreement and ratings from the votes on the sheets.

    python eval/preference/report.py --sheets outputs/preference [--judge outputs/preference/judge.jsonl]

Prints tables and writes report.json beside the sheets. docs/preference.md says how each figure is computed.
"""

import argparse
from pathlib import Path

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.preference import make_report, read_judged, read_key, read_votes
from llm_recipes.evaluation.results import check_output, markdown
from llm_recipes.evaluation.runs import write_json

NO_INTERVAL = "[no interval]"
WHY = f"""{NO_INTERVAL}: the draws of the bootstrap are all alike, as where there is one prompt or nothing but ties, or more than
5 % of them have no value, which report.json counts"""


def figure(value: float | None, ends: list[float] | None, scale: float = 100, digits: int = 1) -> str:
    if value is None:
        return "-"
    interval = f" [{scale * ends[0]:.{digits}f}, {scale * ends[1]:.{digits}f}]" if ends else f" {NO_INTERVAL}"
    return f"{scale * value:.{digits}f}{interval}"


def table(head: str, rows: list[list]) -> str:
    return markdown(head.split(" | "), rows) + "\n"


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

    key, output = read_key(args.sheets), check_output(Path(args.sheets, "report.json"))
    votes, judged = read_votes(args.sheets, key), read_judged(args.judge, key) if args.judge else []
    if not votes and not judged:
        raise UserError(f"{args.sheets} has no votes yet: see eval/preference/page.py, or give --judge")
    report, said = make_report(key, votes, judged), []
    write_json(output, report)

    for rater, found in report["raters"].items():
        said.append(f"{rater}: {found['votes']} of {report['items']} items, left wins {share(found['left_wins'])}")
    for entry in report["identical"]:
        said.append(f"{' | '.join(entry['models'])}: {entry['count']} identical answers, not judged")
    if votes:
        said.append(f"left wins {share(report['left_wins'])} decided votes\n\n{comparison(report)}")
        ratings = report["ratings"]
        rows = [
            [model, quality, figure(r["mean"], r["ci95"], 1, 2), figure(r["share_4_or_5"], r["share_4_or_5_ci95"]), r["n"]]
            for model, qualities in ratings["models"].items()
            for quality, r in qualities.items()
        ]  # fmt: skip
        if rows:
            said.append(table("model | quality | mean of 1 to 5 | 4 or 5, % | ratings", rows))
            for quality, found in ratings["alpha"].items():
                alpha = "not defined" if found["alpha"] is None else f"{found['alpha']:.2f}"
                said.append(f"{quality}: ordinal alpha {alpha} on {found['units']} answers rated twice or more")
    if judged:
        found = report["judge"]
        said += [
            f"\njudge {found['name']}, {found['items']} items in both orders, {found['no_answer']} replies were no answer",
            f"same answer in both orders {share(found['position_consistency'])} items",
            f"the answer shown first wins {share(found['first_shown_wins'])} replies",
            f"agrees with the raters' majority {share(found['agreement_with_raters'])} items\n\n{comparison(found)}",
        ]
    said += [WHY] if any(NO_INTERVAL in text for text in said) else []
    print("\n".join([*said, f"written: {output}"]))


if __name__ == "__main__":
    main()
