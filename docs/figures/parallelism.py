"""Draws the figures of docs/parallelism.md: python docs/figures/parallelism.py

The pipeline's are the orders in which torch's schedules act, `pipeline_order`, placed in time as their dependencies allow:
a forward takes 1, a backward 2, of which the inputs' gradients take 1; sending takes nothing. It prints what that comes to.
"""

from html import escape
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from llm_recipes.launch import Layout
from llm_recipes.pipeline.stages import SCHEDULES, stages_of_rank

BLUE, ORANGE, GREEN, PINK, GREY = "#9ecae9", "#ffbf79", "#a1d99b", "#f3b0c9", "#e8e8e8"
DARK = {BLUE: "#4a90c9", ORANGE: "#e0812b", GREEN: "#4f9d55"}  # of a rank's second stage


class Figure:
    """An SVG on white, so that it reads on dark pages too."""

    def __init__(self, width: int, height: int):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
        ]

    def text(self, x, y, words, size=13, anchor="middle", weight="normal"):
        style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>')

    def box(self, x, y, width, height, colour, words="", size=13):
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" stroke="#555" stroke-width=".7"/>'
        )
        for i, line in enumerate(lines := words.split("\n") if words else []):
            self.text(x + width / 2, y + height / 2 + size * (0.35 + 1.15 * (i - (len(lines) - 1) / 2)), line, size)

    def arrow(self, x1, y1, x2, y2, both=False, dashed=False):
        ends = 'marker-end="url(#tip)"' + (' marker-start="url(#tip)"' if both else "")
        ends += ' stroke-dasharray="4 3"' if dashed else ""
        line = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#222" stroke-width="1.3"'
        self.parts.append(f"<line {line} {ends}/>")

    def save(self, name: str):
        (Path(__file__).parent / f"{name}.svg").write_text("\n".join([*self.parts, "</svg>\n"]))


def data_parallel():
    figure = Figure(640, 200)
    for rank, (x, colour) in enumerate(((40, BLUE), (360, ORANGE))):
        figure.text(x + 120, 24, f"rank {rank}", weight="bold")
        figure.box(x, 36, 240, 30, colour, f"rows {4 * rank} to {4 * rank + 3} of the batch")
        for i, part in enumerate(("all weights", "all gradients", "all of Adam's moments")):
            figure.box(x, 76 + 34 * i, 240, 28, GREY, part)
    figure.arrow(284, 124, 356, 124, both=True)
    figure.text(320, 196, "all-reduce of the gradients, once a step")
    figure.save("dp")


def sharding():
    """Bars of weights, gradients and moments, each as wide as what a device holds of it."""
    rows = {  # shares of weights, gradients, moments; DeepSpeed's second copy of the weights is among the moments
        "DDP": (1, 1, 1, "16"), "ZeRO-1": (1, 1, 0, "8 + 12/N"), "ZeRO-2": (1, 0, 0, "4 + 16/N"),
        "ZeRO-3": (0, 0, 0, "20/N"), "FSDP2": (0, 0, 0, "16/N"), "HSDP": (0, 0, 0, "16/dp_shard"),
    }  # fmt: skip
    figure, colours = Figure(760, 50 + 62 * len(rows)), (BLUE, ORANGE, GREEN, PINK)
    for rank in range(4):
        figure.text(161 + 128 * rank, 26, f"rank {rank}", weight="bold")
    figure.text(675, 26, "bytes a parameter", weight="bold")
    for row, (name, (*wholes, formula)) in enumerate(rows.items()):
        top = 38 + 62 * row
        figure.text(88, top + 30, name, anchor="end", weight="bold")
        figure.text(675, top + 30, formula)
        for rank in range(4):
            left, shards = 104 + 128 * rank, 2 if name == "HSDP" else 4
            for i, whole in enumerate(wholes):
                figure.box(left, top + 17 * i, 114, 15, "#fff")
                part = rank % shards
                width = 114 if whole else 114 / shards
                figure.box(
                    left + (0 if whole else part * width), top + 17 * i, width, 15, GREY if whole else colours[part]
                )
    figure.text(104, 42 + 62 * len(rows), "bars: weights, gradients, optimizer. Grey: all of it. N = 4; HSDP: 2 copies of 2 shards.",
                anchor="start")  # fmt: skip
    figure.save("fsdp")


def tensor_parallel():
    figure = Figure(760, 250)
    figure.box(20, 96, 90, 60, GREY, "hidden\nstates x")
    for rank, (y, colour) in enumerate(((36, BLUE), (146, ORANGE))):
        figure.arrow(112, 126, 146, y + 35)
        figure.box(150, y, 150, 70, colour, f"columns of\nq, k, v, gate, up\nrank {rank}")
        figure.arrow(302, y + 35, 326, y + 35)
        figure.box(330, y, 120, 70, colour, "half the heads,\nhalf the neurons")
        figure.arrow(452, y + 35, 476, y + 35)
        figure.box(480, y, 110, 70, colour, f"rows of\no, down\nrank {rank}")
        figure.arrow(592, y + 35, 626, 126)
    figure.box(630, 96, 110, 60, GREY, "the sum: whole\non both ranks")
    figure.text(685, 176, "all-reduce")
    figure.text(380, 240, "Embedding and head are split by vocabulary; norms are whole on every rank.")
    figure.save("tp")


def when(order: dict[int, list], ranks: int, chunks: int) -> list[list[tuple]]:
    """(start, length, kind F, B, I or W, stage, micro-batch) of every action of each rank, as early as can be."""
    stages, done, clock, placed = ranks * chunks, {}, [0.0] * ranks, [[] for _ in range(ranks)]
    todo = {rank: [] for rank in range(ranks)}
    for rank, actions in order.items():
        forwards = {}
        for action in filter(None, actions):
            for part in action.sub_actions or [action]:
                kind, stage, number = part.computation_type.value, part.stage_index, part.microbatch_index
                if kind == "F":  # counted: 1F1B's order names the last stage's one too high
                    number = forwards[stage] = forwards.get(stage, -1) + 1
                if kind in ("F", "B", "I", "W"):
                    todo[rank].append((kind, stage, number))
    while any(todo.values()):
        for rank, actions in todo.items():
            while actions:
                kind, stage, number = actions[0]
                after = ("F", stage - 1) if kind == "F" else ("I", stage if kind == "W" else stage + 1)
                if kind in ("B", "I") and stage == stages - 1:
                    after = ("F", stage)
                first = kind == "F" and stage == 0
                if not first and (*after, number) not in done:
                    break
                start = max(clock[rank], 0 if first else done[*after, number])
                clock[rank] = start + (2 if kind == "B" else 1) / chunks
                done["I" if kind == "B" else kind, stage, number] = clock[rank]
                placed[rank].append((start, clock[rank] - start, *actions.pop(0)))
    return placed


def pipeline(ranks=4, micro_batches=8, drawn=("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble")):
    dist.init_process_group("fake", rank=0, world_size=ranks)
    unit, figure = 19, Figure(720, 62 + 116 * len(drawn))
    for name, chunks in SCHEDULES.items():
        held = stages_of_rank(name, 0, ranks)
        stages = [PipelineStage(torch.nn.Identity(), n, ranks * chunks, torch.device("cpu")) for n in held]
        schedule = get_schedule_class(name)(stages if chunks > 1 else stages[0], micro_batches, loss_fn=torch.sub)
        placed = when(schedule.pipeline_order, ranks, chunks)
        end = max(start + length for actions in placed for start, length, *_ in actions)
        share, live = 1 - 3 * micro_batches / end, []
        for actions in placed:
            steps = [{"F": 1, "I": 0}.get(kind, -1) for _, _, kind, *_ in actions]
            live.append(max(sum(steps[: i + 1]) for i in range(len(steps))) / chunks)
        print(f"{name}: {end:g} units, bubble {share:.1%}, at most {max(live):g} micro-batches in flight on a rank")
        if name not in drawn:
            continue
        top = 30 + 116 * drawn.index(name)
        figure.text(46, top, f"{name}: bubble {share:.1%}", anchor="start", weight="bold")
        for rank, actions in enumerate(placed):
            figure.text(40, top + 22 + 21 * rank, f"rank {rank}", size=11, anchor="end")
            for start, length, kind, stage, number in actions:
                colour = {"F": BLUE, "B": ORANGE, "I": ORANGE, "W": GREEN}[kind]
                words = f"{number}" if chunks == 1 else ""
                colour = colour if stage < ranks else DARK[colour]
                figure.box(46 + unit * start, top + 8 + 21 * rank, unit * length, 19, colour, words, 12)
    said = ("blue: forward; orange: backward, of the inputs where there is green; green: backward of the weights",
            "number: the micro-batch; dark: the rank's second stage")  # fmt: skip
    for i, line in enumerate(said):
        figure.text(46, 34 + 116 * len(drawn) + 16 * i, line, 12, "start")
    figure.save("pp")


def sequences():
    figure, colours = Figure(760, 300), (BLUE, ORANGE)
    figure.text(170, 24, "Ring attention (cp 2)", weight="bold")
    owner = (0, 1, 1, 0)  # a piece from the front and one from the back: equal work under the causal mask
    for i in range(4):
        figure.box(70 + 50 * i, 40, 50, 26, colours[owner[i]], f"piece {i}", 11)
        figure.text(60, 107 + 34 * i, f"{i}", size=12, anchor="end")
        for j in range(i + 1):
            figure.box(70 + 50 * j, 86 + 34 * i, 50, 34, colours[owner[i]])
    figure.text(170, 244, "queries of piece (row) x keys (column):")
    figure.text(170, 260, "each rank computes 5 of the 10 blocks")
    figure.text(170, 286, "keys and values go round; blue rank 0, orange 1", size=12)
    figure.text(560, 24, "Ulysses (sp 2)", weight="bold")
    for x, cells, name in ((410, "rows", "all but attention"), (600, "columns", "attention")):
        for i in range(4):
            for j in range(4):
                figure.box(x + 30 * j, 86 + 34 * i, 30, 34, colours[(i if cells == "rows" else j) // 2])
        figure.text(x + 60, 64, name, size=12)
        figure.text(x + 60, 80, "heads 0 to 3", size=11)
    figure.text(402, 158, "tokens", size=11, anchor="end")
    figure.arrow(534, 142, 596, 142, both=True)
    figure.text(565, 132, "all-to-all", size=11)
    figure.text(560, 244, "a part of the tokens with all heads becomes")
    figure.text(560, 260, "all tokens with a part of the heads, and back")
    figure.save("sequence")


def experts():
    figure, colours = Figure(720, 250), (BLUE, ORANGE)
    for rank, x in enumerate((30, 340)):
        figure.text(x + 135, 22, f"rank {rank}", weight="bold")
        figure.box(x, 34, 270, 30, colours[rank], f"attention of the tokens of rank {rank}, router")
        for i in range(2):
            figure.box(x + 145 * i, 136, 125, 34, colours[rank], f"expert {2 * rank + i}")
            for source in (165, 475):
                figure.arrow(source, 66, x + 62 + 145 * i, 133, dashed=source != x + 135)
                figure.arrow(x + 62 + 145 * i, 172, source, 211, dashed=source != x + 135)
        figure.box(x, 213, 270, 28, colours[rank], f"sums for the tokens of rank {rank}")
    figure.text(660, 104, "all-to-all")
    figure.text(660, 196, "all-to-all")
    figure.save("ep")


def product():
    ways, figure = Layout(pp=2, dp_shard=2, tp=2), Figure(760, 270)
    for rank in range(ways.size):
        tp, shard, stage = rank % ways.tp, ways.data_rank(rank), rank // (ways.size // ways.pp)
        x, y = 60 + 350 * stage + 160 * tp, 50 + 96 * shard
        words = f"rank {rank}\nrows of shard {shard}\nhalf {tp} of matrices"
        figure.box(x, y, 130, 66, (BLUE, GREEN)[stage] if tp == 0 else (ORANGE, PINK)[stage], words, 12)
        if tp == 0:
            figure.arrow(x + 133, y + 33, x + 157, y + 33, both=True)
            figure.text(x + 145, y + 26, "tp", size=11)
        if shard == 0:
            figure.arrow(x + 65, y + 69, x + 65, y + 93, both=True)
            figure.text(x + 72, y + 85, "dp_shard", size=11, anchor="start")
    for stage in range(ways.pp):
        figure.text(
            205 + 350 * stage, 32, f"stage {stage}: {('first', 'last')[stage]} half of the layers", weight="bold"
        )
    for y, pairs in ((83, "0-4, 1-5"), (179, "2-6, 3-7")):
        figure.arrow(354, y, 406, y, both=True)
        figure.text(380, y - 7, "pp", size=11)
        figure.text(380, y + 16, pairs, size=11)
    figure.text(
        380,
        250,
        "rank = ((pp x dp_replicate + replica) x dp_shard + shard) x tp + part: tp counts fastest, on the fastest links",
    )
    figure.save("3d")


if __name__ == "__main__":
    for draw in (data_parallel, sharding, tensor_parallel, pipeline, sequences, experts, product):
        draw()
