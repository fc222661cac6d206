"""docs/quality.md and docs/quality.png from the figures of benchmarks/quality.py. Knows a result file; runs nothing."""

from pathlib import Path
from statistics import mean
from typing import Any

RANKS = ("LoRA r=1", "LoRA r=4", "LoRA r=16")
ATTENTION, FROZEN, FULL, BASE = "LoRA, attention only", "full, embeddings frozen", "full fine-tuning", "base"
REACHED = 1.02  # of full fine-tuning's test loss
DOCS = Path(__file__).parent.parent / "docs"


def page(record: dict[str, Any]) -> str:
    """Return docs/quality.md; a function of the record alone."""
    figures = record["figures"]
    recipe, tasks, runs = figures["recipe"], figures["tasks"], figures["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    seeds = max(len(own["seeds"]) for systems in runs.values() for name, own in systems.items() if name != BASE)
    lines = [
        "# Does LoRA reach full fine-tuning?",
        "",
        "Written by `python -m benchmarks.suites.quality --page` from `benchmarks/results/quality.json`, which",
        "`python -m benchmarks.suites.quality` makes. The question is that of *LoRA Without Regret* (Thinking",
        "Machines, 2025), asked small: SmolLM2-135M in float32, three tasks, each system at its own best learning rate.",
        "",
        f"Machine: {record['machine']}. Versions: {versions}. Commit: {record['commit']}.",
        "",
        "## Answer",
        "",
        f"*Reaches* means: a test loss at most {REACHED - 1:.0%} above that of full fine-tuning.",
        "",
        *[f"- **{name}**: {answer(systems)}" for name, systems in runs.items()],
        f"- **learning rate**: {rates(runs)}",
        "",
        "![Test loss by trained parameters, and validation loss by learning rate](quality.png)",
    ]
    for name, systems in runs.items():
        lines += ["", f"## {name}", "", f"{tasks[name]['what']} From {tasks[name]['source']}.", "", *table(systems)]
        lines += ["", like(tasks[name])]
    note = f"the mean of {seeds} seeds, which set A's first values and the order of the examples" if seeds > 1 else ""
    lines += [
        "",
        "## How it was measured",
        "",
        f"- Batches of {recipe['batch_size']} examples, {recipe['epochs']} epochs, {recipe['schedule']} decay after a "
        f"warm-up of {recipe['warmup_ratio']:.0%};",
        "  AdamW, no weight decay, gradients clipped to 1. All systems read the same batches in the same order, and",
        "  loss, optimizer and schedule are the same; full fine-tuning is a plain loop over all the weights.",
        "- LoRA has `lora_alpha=32` and sits on all linear layers; *attention only* has r=11 on the projections of",
        "  queries and outputs and r=10 on those of keys and values, which makes exactly the parameters of r=4.",
        "- Rates are half a decade apart. The search goes on until the rates on both sides of the best were tried and",
        "  are worse, on the validation split. The test split is read once, with the weights after the last step.",
        "- Losses are nats per token of the answer and its end. *Exact* is the share of the test's answers that greedy",
        f"  decoding gives to the letter.{f' Figures are {note}.' if note else ''}",
        "",
        "## What it does not show",
        "",
        "- Data that exceed an adapter's capacity: these are small, as data for adapters mostly are.",
        *([] if seeds > 1 else ["- The noise of the seed: there is one."]),
        "- That a difference of a few answers in *exact* is more than chance: with n answers its standard error is",
        "  √(p(1-p)/n), 3.6 points at one half of 192.",
        "",
    ]
    return "\n".join(lines)


def answer(systems: dict[str, Any]) -> str:
    losses = {name: test_loss(own) for name, own in systems.items()}
    full = losses[FULL]
    enough = next((name for name in RANKS if losses[name] <= REACHED * full), None)
    named = enough or min(RANKS, key=losses.__getitem__)
    share = parameters(systems[named]) / parameters(systems[FULL])
    verb = f"{named} reaches it" if enough else f"no rank reaches it; the nearest is {named}"
    return (
        f"{verb}, with {share:.2%} of the bytes: a test loss of {losses[named]:.3f} against {full:.3f} "
        f"({losses[named] / full - 1:+.1%}). Full fine-tuning with the embeddings frozen, as LoRA leaves them: "
        f"{losses[FROZEN]:.3f}. Attention only, against all linear layers with as many parameters: "
        f"{losses[ATTENTION] / losses['LoRA r=4'] - 1:+.1%} loss."
    )


def rates(runs: dict[str, Any]) -> str:
    found = [best_rate(systems[name]) / best_rate(systems[FULL]) for systems in runs.values() for name in RANKS]
    times = " to ".join(dict.fromkeys(f"{each:.0f}" for each in (min(found), max(found))))
    return (
        f"LoRA's best is {times} times that of full fine-tuning, over all ranks and tasks; "
        "LoRA Without Regret found 10."
    )


def table(systems: dict[str, Any]) -> list[str]:
    exact = "exact match" in systems[BASE]
    full = parameters(systems[FULL])
    lines = [
        f"| | trained parameters | MB in float32 | share | rate | test loss |{' exact |' if exact else ''}",
        f"|---|---|---|---|---|---|{'---|' if exact else ''}",
    ]
    for name in (BASE, *RANKS, ATTENTION, FROZEN, FULL):
        own = systems[name]
        size = parameters(own)
        rate = f"{best_rate(own):g}" if size else "–"
        cells = [name, f"{size:,}", f"{size * 4 / 1e6:.1f}", f"{size / full:.2%}", rate]
        cells += [f"{test_loss(own):.3f}"] + ([f"{figure(own, 'exact match'):.0%}"] if exact else [])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def like(task: dict[str, Any]) -> str:
    prompt, answer = task["like"]
    sizes = f"{task['train']} examples ({task['train tokens']:,} tokens), {task['valid']} to validate, {task['test']}"
    return f"{sizes} to test; the first: `{prompt}` → `{answer}`."


def parameters(own: dict[str, Any]) -> int:
    return own.get("parameters", 0)


def test_loss(own: dict[str, Any]) -> float:
    return figure(own, "test loss")


def figure(own: dict[str, Any], key: str) -> float:
    """Return a figure of a system on the test split, the mean over its seeds."""
    return mean(each[key] for each in own["seeds"].values()) if "seeds" in own else own[key]


def best_rate(own: dict[str, Any]) -> float:
    losses = own["valid loss by rate"]
    return float(min(losses, key=losses.__getitem__))


def plot(record: dict[str, Any]) -> None:
    """Write docs/quality.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = record["figures"]["runs"]
    drawing, rows = plt.subplots(2, len(runs), figsize=(4.2 * len(runs), 7.2), layout="constrained", squeeze=False)
    for (name, systems), above, below in zip(runs.items(), *rows, strict=True):
        sizes, losses = ([value(systems[rank]) for rank in RANKS] for value in (parameters, test_loss))
        above.plot(sizes, losses, color="lightgrey", zorder=0)
        above.axhline(test_loss(systems[FULL]), color="lightgrey", linestyle=":", zorder=0)
        for n, system in enumerate((*RANKS, ATTENTION, FROZEN, FULL)):
            own, style = systems[system], {"color": f"C{n}", "marker": "ooosDD"[n], "label": system}
            above.plot(parameters(own), test_loss(own), linestyle="", **style)
            losses = own["valid loss by rate"]
            below.plot([float(rate) for rate in losses], [*losses.values()], **style)
        above.set(xscale="log", xlabel="trained parameters", title=name, ylabel="test loss (nats per token)")
        above.set_ylim(0, 1.1 * max(test_loss(own) for system, own in systems.items() if system != BASE))
        below.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    drawing.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    drawing.savefig(DOCS / "quality.png", dpi=100, metadata={"Software": None})
    plt.close(drawing)
