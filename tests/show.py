"""The rollouts of a run as one HTML file that needs nothing else: groups, hints, texts, rewards.

    python tests/show.py RUN [STEP]        writes RUN/show.html: that step, or each of the last 20

Groups stand in the order of their hardness: never solved, solved at the largest hint, ..., solved
without one. What a model wrote is data in the page and reaches it as text nodes only, so that it
can run no script.
"""

import json
import sys
from pathlib import Path

LAST_STEPS = 20
CURVES = ("accuracy_without_hint", "hard_fraction", "truncated")
PAGE = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-show'">
<title>Rollouts</title>
<style>
  body { font: 14px/1.4 system-ui, sans-serif; margin: 1em auto; max-width: 70em;
         padding: 0 1em; }
  pre { white-space: pre-wrap; background: #f4f4f4; padding: .5em; margin: .3em 0; }
  .group { border: 1px solid #bbb; margin: 1em 0; padding: .5em 1em; }
  .right { border-left: 4px solid #2a2; } .wrong { border-left: 4px solid #c33; }
  figure { display: inline-block; margin: 0 1.5em 0 0; }
  svg { border: 1px solid #bbb; display: block; } label { margin: 0 1em 0 .5em; }
</style>
<h1 id="title"></h1>
<div id="curves"></div>
<p>Step <select id="step"></select>
  <label><input type="checkbox" id="hinted"> solved only with a hint</label>
  <label><input type="checkbox" id="format"> format failed</label>
  <label><input type="checkbox" id="cut"> truncated</label>
  <span id="count"></span></p>
<div id="groups"></div>
<script type="application/json" id="data">DATA</script>
<script nonce="show">
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);

function add(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.appendChild(made);
  return made;
}

function curve(name) {
  const points = data.curves[name], width = 300, height = 80;
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  const line = document.createElementNS(space, "polyline");
  const last = Math.max(1, points.length - 1);
  line.setAttribute("points", points.map((value, i) =>
    `${5 + (width - 10) * i / last},${height - 5 - (height - 10) * value}`).join(" "));
  line.setAttribute("fill", "none");
  line.setAttribute("stroke", "#36c");
  svg.appendChild(line);
  const figure = add(at("curves"), "figure");
  add(figure, "figcaption", `${name}, 0 to 1, by step`);
  figure.appendChild(svg);
}

function draw() {
  at("groups").replaceChildren();
  const wanted = data.groups.filter(group => group.step == at("step").value
    && (!at("hinted").checked || group.only_with_hint)
    && (!at("format").checked || group.format_failed)
    && (!at("cut").checked || group.truncated));
  at("count").textContent = `groups: ${wanted.length}`;
  for (const group of wanted) {
    const box = add(at("groups"), "div", undefined, "group");
    add(box, "h3", `problem ${group.id}: ${group.outcome}`);
    add(box, "p", `gold ${group.gold}; stages ${group.stages}`);
    add(box, "pre", group.prompt);
    if (group.hint) add(box, "p", `hint, ratio ${group.hint_ratio}:`);
    if (group.hint) add(box, "pre", group.hint);
    for (const sample of group.samples) {
      add(box, "div", `${sample.scores}; ${sample.tokens} tokens, ${sample.finish_reason}`);
      if (sample.hint !== group.hint) add(box, "div", `this sample's hint, ratio ${sample.ratio}:`);
      if (sample.hint !== group.hint) add(box, "pre", sample.hint || "none");
      add(box, "pre", sample.text, sample.is_right ? "right" : "wrong");
    }
  }
}

at("title").textContent = data.title;
Object.keys(data.curves).forEach(curve);
for (const step of data.steps) add(at("step"), "option", step).value = step;
for (const id of ["step", "hinted", "format", "cut"]) at(id).addEventListener("change", draw);
draw();
</script>
"""


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown_group(line: dict, step: int) -> dict:
    """What the page needs of a group's line in the rollouts."""
    known = ("text", "tokens", "finish_reason", "hint_ratio", "prompt", "hint")
    names = [key for key in line["completions"][0] if key not in known]
    main = "accuracy" if "accuracy" in names else names[0]
    samples = []
    for sample in line["completions"]:
        samples.append({
            "text": sample["text"],
            "tokens": sample["tokens"],
            "finish_reason": sample["finish_reason"],
            "scores": ", ".join(f"{name} {sample[name]:g}" for name in names),
            "is_right": sample[main] > 0,
            "ratio": sample["hint_ratio"],
            "hint": sample.get("hint", line["hint"]),  # its own where it differs from the first's
        })  # fmt: skip
    stages = [stage for stage in line["stages"] if not stage["is_skipped"]]
    solved = [max(stage["ratios"]) for stage in stages if any(p > 0 for p in stage["passes"])]
    if not solved:
        outcome, hardness = "never solved", 2.0
    elif solved[0] == 0:
        outcome, hardness = "solved without a hint", 0.0
    else:
        outcome, hardness = f"solved with a hint of {solved[0]:g}", solved[0]
    tried = ", ".join(
        f"{max(stage['ratios']):g}: {sum(stage['passes']):g} of {len(stage['passes'])}"
        for stage in stages
    )
    return {
        "step": step,
        "id": line["id"],
        "outcome": outcome,
        "hardness": hardness,
        "only_with_hint": 0 < hardness <= 1,
        "format_failed": any(sample.get("format") == 0 for sample in line["completions"]),
        "truncated": any(s["finish_reason"] == "length" for s in line["completions"]),
        "gold": line["gold"],
        "stages": tried,
        "prompt": line["prompt"],
        "hint": line["hint"],
        "hint_ratio": line["hint_ratio"],
        "samples": samples,
    }


def page(run: Path, step: int | None = None) -> str:
    """The HTML of a run's rollouts; SystemExit when it has none."""
    paths = sorted((run / "rollouts").glob("step_*.jsonl"))
    log = run / "metrics.jsonl"
    if step is not None:
        paths = [path for path in paths if int(path.stem.split("_")[1]) == step]
    meant = "RUN is the output_dir of a training run"
    if not paths:
        wanted = "step" if step is None else f"step {step}"
        sys.exit(f"show: {run}/rollouts has no {wanted}: {meant}")
    if not log.is_file():
        sys.exit(f"show: {log} is not there: {meant}")
    groups = []
    for path in paths[-LAST_STEPS:]:
        number = int(path.stem.split("_")[1])
        of_step = [shown_group(line, number) for line in read_jsonl(path)]
        groups += sorted(of_step, key=lambda group: -group["hardness"])
    metrics = [line for line in read_jsonl(log) if "loss" in line]
    data = {
        "title": f"Rollouts of {run}",
        "groups": groups,
        "steps": sorted({group["step"] for group in groups}, reverse=True),
        "curves": {key: [line[key] for line in metrics if key in line] for key in CURVES},
    }
    # a text cannot end the data's element: < is \\u003c there
    return PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


def main() -> None:
    if len(sys.argv) not in (2, 3) or not all(word.isdecimal() for word in sys.argv[2:]):
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    step = int(sys.argv[2]) if len(sys.argv) == 3 else None
    path = run / "show.html"
    path.write_text(page(run, step), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
