"""The report of `vtr recommend`: lines of text, and a page with the curve."""

import json
from collections.abc import Mapping
from typing import Any

from eval.pages import asset, environment, inline_json
from eval.results.statistics import rounded
from eval.tables import BRIGHT, markdown

TIE = 5  # percent of the recommended cost up to which another configuration costs the same

Record = Mapping[str, Any]  # what eval.recommend.command.recommend returns


def sentences(record: Record) -> list[str]:
    """The report as lines for the terminal."""
    lines = [record["banner"], ""] if record["banner"] else []
    lines += [f"{headline(record)}.", *facts(record), "", markdown(HEADER, table(record)), "", *notes(record)]
    return [*lines, "", *python(record)] if python(record) else lines


def headline(record: Record) -> str:
    """The recommendation in a few words."""
    chosen = chosen_of(record)
    return f"Recommended: {name(chosen) if chosen else 'full, without reduction'}"


def facts(record: Record) -> list[str]:
    """What the recommendation rests on, one sentence each."""
    level, tolerated, chosen = f"{100 * record['confidence']:g} %", f"{record['tolerated']:g}", chosen_of(record)
    tested = sorted((one for one in record["configurations"] if one["tested"]), key=lambda one: one["high"])
    about = f"{record['title']}, {record['model']}: full scores {rounded(record['full']['score'])} % on "
    found = [f"{about}{record['questions']:,} questions about {record['pictures']:,} pictures."]
    if chosen:
        found += [
            f"Loss: {rounded(chosen['loss'])} points on these questions, and at most {rounded(chosen['high'])} on "
            f"others like them with {level} confidence. Tolerated: {tolerated}.",
            f"Cost: {rounded(chosen['saved'])} % less than full ({record['cost']}).",
            runner_up(record, chosen),
        ]
    elif tested:
        best = tested[0]
        found.append(
            f"No configuration is shown to lose at most {tolerated} points with {level} confidence. The smallest loss "
            f"that is shown: {name(best)} loses at most {rounded(best['high'])} points. Ask more questions, or "
            "tolerate that."
        )
    else:
        found.append("No configuration costs less than full.")
    share = rounded(100 * record["asked"] / record["sweep"], 0)
    found.append(
        f"Asked {record['asked']:,} of the {record['sweep']:,} questions that full and all configurations would take "
        f"({share} %)."
    )
    return found


def runner_up(record: Record, chosen: Record) -> str:
    """The next best of the configurations that were asked most questions, and whether it is a tie."""
    others = [one for one in record["configurations"] if one is not chosen and one["pictures"]]
    if not others:
        return "Runner-up: none; no other configuration costs less than full."
    fates = ("passed", "not shown", "others were better", "loses too much")
    best = min(others, key=lambda one: (-one["pictures"], fates.index(one["fate"]), one["cost"]))
    more = 100 * (best["cost"] / chosen["cost"] - 1)
    cost = f"costs {rounded(abs(more))} % {'more' if more >= 0 else 'less'}"
    if best["fate"] != "passed":
        asked = f" on the {best['pictures']:,} pictures that it was asked about"
        return f"Runner-up: {name(best)} ({best['fate']}): loses {rounded(best['loss'])} points{asked} and {cost}."
    tie = " A tie: take either." if more <= TIE else ""
    loss = f"loses {rounded(best['loss'])} points, at most {rounded(best['high'])}"
    return f"Runner-up: {name(best)}: {loss}, and {cost}.{tie}"


def notes(record: Record) -> list[str]:
    """How to read the table, and what was left out."""
    found = [
        record["can_show"],
        "A loss is full's score minus the configuration's on the same questions. Configurations that fell behind were "
        "asked fewer questions; the ends of their losses have 90 % confidence each. Those that reached the last test "
        f"have ends with {100 * record['confidence']:g} % confidence for all {len(record['configurations'])} "
        "configurations together.",
    ]
    return found + [f"Left out, because this model cannot run it: {one}" for one in record["left_out"]]


HEADER = ("configuration", "tokens", "cost saved", "loss", "from", "to", "pictures", "result")


def table(record: Record) -> list[list[str]]:
    """A row of HEADER for each configuration, the cheapest first."""
    return [
        [
            name(one),
            f"{one['tokens']:,}",
            f"{rounded(one['saved'])} %",
            *("" if one[key] is None else rounded(one[key]) for key in ("loss", "low", "high")),
            f"{one['pictures']:,}",
            one["fate"],
        ]
        for one in sorted(record["configurations"], key=lambda one: one["cost"])
    ]


def name(one: Record) -> str:
    """A configuration in words, "divprune at 1/3"."""
    options = f" ({', '.join(one['options'])})" if one["options"] else ""
    return f"{one['method']}{options} at {one['budget']}"


def chosen_of(record: Record) -> Record | None:
    """The recommended configuration."""
    return None if record["chosen"] is None else record["configurations"][record["chosen"]]


def python(record: Record) -> list[str]:
    """The lines of Python that use the recommendation; none for full."""
    chosen = chosen_of(record)
    if chosen is None:
        return []
    budget = chosen["budget"] if chosen["budget"].isdecimal() else f'"{chosen["budget"]}"'
    options = "".join(f", {key}={text!r}" for key, text in chosen["python"].items())
    return [
        "from llava import reduce",
        f'with reduce(model, "{chosen["method"]}", budget={budget}{options}):',
        "    output = model.generate(**inputs, max_new_tokens=64)",
    ]


def page(record: Record) -> str:
    """The report as one HTML file, which needs nothing from the network."""
    from plotly.offline import get_plotlyjs

    return (
        environment()
        .get_template("recommend.html.j2")
        .render(
            style=asset("style.css"),
            script=asset("sort.js"),
            plotly=get_plotlyjs(),
            figure=inline_json(json.dumps(figure(record), allow_nan=False)),
            record=record,
            headline=headline(record),
            facts=facts(record),
            header=HEADER,
            rows=table(record),
            notes=notes(record),
            python="\n".join(python(record)),
        )
    )


def figure(record: Record) -> dict[str, Any]:
    """Loss against cost as plotly reads it, one line for each method, with the ends of the losses."""
    grey, grid = "#7d8894", "rgba(128,128,128,0.25)"
    lines, full = [], record["full"]["cost"]
    for number, method in enumerate(dict.fromkeys(one["method"] for one in record["configurations"])):
        own = [one for one in record["configurations"] if one["method"] == method and one["loss"] is not None]
        own.sort(key=lambda one: one["cost"])
        ends = {"array": [one["high"] - one["loss"] for one in own]}
        ends["arrayminus"] = [one["loss"] - one["low"] for one in own]
        lines.append(
            {
                "name": method,
                "mode": "lines+markers",
                "x": [100 * one["cost"] / full for one in own],
                "y": [one["loss"] for one in own],
                "text": [f"{name(one)}: {one['fate']}, {one['pictures']} pictures" for one in own],
                "hovertemplate": "%{text}<br>%{y:.1f} points, %{x:.0f} %<extra></extra>",
                "error_y": {"type": "data", "symmetric": False, "thickness": 1, **ends},
                "marker": {"size": [13 if one["fate"] == "recommended" else 7 for one in own], "symbol": number},
                "line": {"color": BRIGHT[number % (len(BRIGHT) - 1)], "width": 1},
            }
        )
    known = [one for one in record["configurations"] if one["loss"] is not None]
    # The ends of losses on few pictures would leave no room for the others.
    seen = [0.0, record["tolerated"], *(one["loss"] for one in known), *(one["high"] for one in known if one["tested"])]
    room = 0.1 * (max(seen) - min(seen))
    ends_of_axis = [min(seen) - room, max(seen) + room]
    axis = {"gridcolor": grid, "zerolinecolor": grid, "automargin": True}
    layout = {
        "xaxis": {"title": {"text": "cost, % of full"}, **axis},
        "yaxis": {"title": {"text": "loss, points"}, "range": ends_of_axis, **axis},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": record["tolerated"], "y1": record["tolerated"],
             "line": {"color": grey, "dash": "dash"}}
        ],
        "legend": {"orientation": "h", "y": -0.25},
        "margin": {"l": 48, "r": 8, "t": 8, "b": 40},
        "font": {"color": grey},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }  # fmt: skip
    return {"data": lines, "layout": layout, "config": {"responsive": True, "displayModeBar": False}}
