"""A local page on which a rater compares answers, two at a time.

    python eval/preference/page.py --rater alice

Each vote is on disk (votes-alice.jsonl) before the next item is shown; start it again to go on. Only this machine can
open the page, and neither it nor the server asks another host for anything. Needs `pip install gradio`.
"""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.preference import (
    QUALITIES,
    RATINGS,
    VOTES,
    append_vote,
    check_name,
    read_csv_votes,
    read_page_votes,
)
from llm_recipes.evaluation.results import read_jsonl

# Five numbers in a row: the circles take no room, the chosen number is coloured
CSS = """fieldset .wrap {flex-wrap: nowrap; gap: 4px} fieldset label {padding: 4px 10px; min-width: 0}
fieldset label input {position: absolute; opacity: 0} fieldset label span {margin: 0 !important}
fieldset label:has(input:checked) {background: var(--primary-500); color: white}"""
SAID = dict(zip(VOTES, ("Left is better", "Right is better", "Tie", "Both are bad"), strict=True))


def build(gr, items: list[dict], votes: dict[int, dict], path: Path):
    """The page: items {item, prompt, left, right}, the votes so far {item: vote}, and the file that gets new ones."""

    def unrated():
        return next((n for n, item in enumerate(items) if item["item"] not in votes), len(items) - 1)

    def show(at: int):
        item = items[at]
        vote = votes.get(item["item"], {})
        said = f" · your vote: {SAID[vote['vote']]}" if vote else ""
        done = "All are rated: close the page, or go back to change a vote. " if len(votes) == len(items) else ""
        progress = f"{done}Item {at + 1} of {len(items)} · {len(votes)} rated{said}"
        ratings = [vote.get(name) for name in RATINGS]
        return [at, progress, item["prompt"], item["left"], item["right"], *ratings, vote.get("comment", "")]

    def save(choice: str):
        def act(at, comment, *ratings):
            vote = {"item": items[at]["item"], "vote": choice, **dict(zip(RATINGS, ratings, strict=True))}
            vote |= {"comment": comment, "time": datetime.now(UTC).isoformat(timespec="seconds")}
            append_vote(path, vote)
            votes[vote["item"]] = vote
            return show(unrated())

        return act

    with gr.Blocks(title="Which answer is better?", analytics_enabled=False, fill_width=True) as page:
        at = gr.State(0)
        progress = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="progress")
        # Text boxes, for answers are not to be trusted: as Markdown or HTML they could run in the rater's browser
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=15, interactive=False, elem_id="prompt")
        answers, ratings = [], {}
        with gr.Row():
            for side in ("left", "right"):
                with gr.Column():
                    label = f"{side.title()} answer"
                    answers.append(gr.Textbox(label=label, lines=10, max_lines=40, interactive=False, elem_id=side))
                    with gr.Row():
                        for quality in QUALITIES:
                            name, label = f"{side}_{quality}", f"{quality.title()}, 1 to 5"
                            ratings[name] = gr.Radio([1, 2, 3, 4, 5], label=label, elem_id=name, min_width=120)
        comment = gr.Textbox(label="Comment (optional)", lines=1, max_lines=4, elem_id="comment")
        with gr.Row():
            buttons = {
                choice: gr.Button(said, variant="primary", elem_id=f"vote_{choice}") for choice, said in SAID.items()
            }
        with gr.Row():
            steps = {name: gr.Button(name, size="sm", elem_id=name.lower()) for name in ("Back", "Forward")}
        shown = [at, progress, prompt, *answers, *(ratings[name] for name in RATINGS), comment]
        given = [at, comment, *(ratings[name] for name in RATINGS)]
        options = {"outputs": shown, "concurrency_id": "votes", "show_progress": "hidden", "api_visibility": "private"}
        page.load(lambda: show(unrated()), **options)
        for choice, button in buttons.items():
            button.click(save(choice), given, **options)
        for name, step in (("Back", -1), ("Forward", 1)):
            steps[name].click(lambda at, step=step: show(min(max(at + step, 0), len(items) - 1)), at, **options)
    return page


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sheets", default="outputs/preference", help="folder of sheets.py")
    parser.add_argument("--rater", required=True)
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()

    sheet, path = (Path(args.sheets, f"{kind}-{check_name(args.rater)}.jsonl") for kind in ("sheet", "votes"))
    if not sheet.exists():
        raise UserError(f"{sheet} does not exist: make it with eval/preference/sheets.py --raters {args.rater}")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False"}  # read at import
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the page needs gradio: pip install gradio. Without it, fill in the CSV sheets") from error
    items = read_jsonl(sheet)
    numbers = {item["item"] for item in items}
    if filled := read_csv_votes(sheet.with_suffix(".csv"), numbers):
        raise UserError(f"{sheet.with_suffix('.csv')} has {len(filled)} votes: go on there, or empty it")
    votes = read_page_votes(path, numbers)
    page = build(gr, items, votes, path)
    print(
        f"http://127.0.0.1:{args.port} for {args.rater}: {len(votes)} of {len(items)} rated. Ctrl-C ends it", flush=True
    )
    try:
        page.launch(
            server_name="127.0.0.1", server_port=args.port, share=False, quiet=True, footer_links=[], run_history=False,
            ssr_mode=False, pwa=False, css=CSS, mcp_server=False, enable_monitoring=False, show_error=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {args.port} is taken: choose another --port") from error


if __name__ == "__main__":
    main()
