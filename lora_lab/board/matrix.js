// The table of pictures: its axes, what its cells show, and the way through it by keyboard.

// ---- axes: swept keys, @run, @prompt, @seed, @step

const order = [...data.ranking, ...runs.keys()].filter((run, i, all) => all.indexOf(run) === i);
const axes = new Map(KEYS.map((key) => [key, swept[key]]));
if (runs.length > 1) axes.set("@run", order);
if (data.prompts.length > 1) axes.set("@prompt", [...data.prompts.keys()]);
if (seeds.length > 1) axes.set("@seed", seeds);
const ends = new Set(lastStep.filter((step) => step >= 0));
if (steps.length > 1) axes.set("@step", ends.size > 1 ? [...steps, LAST] : steps); // runs may end at different steps
const AXIS_WORDS = new Map([["@run", "run"], ["@prompt", "prompt"], ["@seed", "seed_drawn"], ["@step", "step"]]);
const axisName = (axis) => (AXIS_WORDS.has(axis) ? say(AXIS_WORDS.get(axis)) : axis);
function valueName(axis, value) {
  if (value === undefined) return "";
  if (axis === "@run") return runs[value].label;
  if (axis === "@prompt") return data.prompts[value];
  return value === LAST ? say("last") : number(value);
}
const chosen = Object.create(null); // axis -> index of the value shown, of axes that are neither rows nor columns
for (const [axis, values] of axes) {
  const wanted =
    axis === "@step"
      ? values.length - 1
      : best !== null && KEYS.includes(axis)
        ? values.findIndex((v) => same(v, runs[best].settings[axis]))
        : 0;
  chosen[axis] = Math.max(0, wanted);
}
const state = {
  rows: axes.has(data.axes.rows) ? data.axes.rows : null,
  columns: axes.has(data.axes.columns) ? data.axes.columns : null,
  stepping: null,
};
function same(a, b) {
  return JSON.stringify(a) === JSON.stringify(b);
}
function free() {
  // axes that can be stepped through
  const byRun = [state.rows, state.columns].includes("@run");
  const byKey = KEYS.includes(state.rows) || KEYS.includes(state.columns);
  return [...axes.keys()].filter(
    (axis) =>
      axis !== state.rows &&
      axis !== state.columns &&
      !(KEYS.includes(axis) && byRun) &&
      !(axis === "@run" && (byKey || KEYS.length)),
  );
}
function settle() {
  const left = free();
  if (!left.includes(state.stepping)) state.stepping = left.includes("@step") ? "@step" : (left[0] ?? null);
}
function at(row, column) {
  // what a cell shows: its run or runs, step, prompt and seed
  const value = (axis) =>
    axis === state.rows && row !== undefined
      ? row
      : axis === state.columns && column !== undefined
        ? column
        : axes.get(axis)?.[chosen[axis]];
  const byRun = [state.rows, state.columns].includes("@run");
  const found = byRun
    ? [value("@run")]
    : order.filter((run) => KEYS.every((key) => same(runs[run].settings[key], value(key))));
  if (!KEYS.length && !byRun && axes.has("@run")) found.splice(0, found.length, value("@run"));
  return {
    found,
    run: found[0],
    step: axes.has("@step") ? value("@step") : LAST,
    prompt: value("@prompt") ?? 0,
    seed: value("@seed") ?? seeds[0] ?? 0,
  };
}

// ---- the matrix

function option(value, text, selected) {
  return make("option", { value, selected }, text);
}
function picker(id, label, options, value, change) {
  const select = make(
    "select",
    {
      id,
      onchange: () => {
        change(select.value);
        refresh(id);
      },
    },
    ...options.map(([v, text]) => option(v, text, v === value)),
  );
  return make("label", { for: id }, label, select);
}
function showControls() {
  settle();
  const names = [...axes.keys()].map((axis) => [axis, axisName(axis)]);
  const pick = (side, other) => (axis) => {
    if (axis === state[other]) state[other] = state[side];
    state[side] = axis || null;
    if (KEYS.includes(axis) && state[other] === "@run")
      state[other] = KEYS.find((key) => key !== axis) ?? (axes.has("@prompt") ? "@prompt" : null);
    if (axis === "@run" && KEYS.includes(state[other])) state[other] = axes.has("@prompt") ? "@prompt" : null;
  };
  const nothing = ["", say("nothing")];
  const controls = [
    picker("rows", say("rows"), [...names, nothing], state.rows ?? "", pick("rows", "columns")),
    picker("columns", say("columns"), [...names, nothing], state.columns ?? "", pick("columns", "rows")),
  ];
  const left = free();
  if (left.length > 1)
    controls.push(
      picker(
        "stepping",
        say("stepping"),
        left.map((axis) => [axis, axisName(axis)]),
        state.stepping,
        (axis) => {
          state.stepping = axis;
        },
      ),
    );
  for (const axis of left.filter((a) => a !== state.stepping)) {
    const options = axes.get(axis).map((value, i) => [String(i), valueName(axis, value)]);
    controls.push(
      picker(`of-${axis}`, axisName(axis), options, String(chosen[axis]), (i) => {
        chosen[axis] = Number(i);
      }),
    );
  }
  if (state.stepping) {
    const output = make(
      "output",
      { id: "step-value" },
      valueName(state.stepping, axes.get(state.stepping)[chosen[state.stepping]]),
    );
    const slider = make("input", {
      type: "range",
      id: "step",
      min: 0,
      max: axes.get(state.stepping).length - 1,
      oninput: () => stepTo(Number(slider.value)),
    });
    slider.value = chosen[state.stepping];
    slider.setAttribute("aria-valuetext", output.textContent);
    controls.push(
      make("label", { className: "step", for: "step" }, axisName(state.stepping), make("span", {}, slider, output)),
    );
  }
  const size = make("input", {
    type: "range",
    id: "size",
    min: 64,
    max: 320,
    step: 4,
    oninput: () => {
      wanted = size.value;
      fit();
    },
  });
  size.value = fit();
  controls.push(make("label", { className: "size", for: "size" }, say("size"), size));
  $("controls").replaceChildren(...controls);
}
let wanted = null; // px of a picture's side, once it has been chosen; until then as many as fit
function fit() {
  const across = (state.columns ? axes.get(state.columns).length : 1) + 1;
  const side = Number(wanted ?? Math.min(232, Math.max(88, Math.floor(($("pictures").clientWidth - 90) / across) - 8)));
  document.documentElement.style.setProperty("--cell", `${side}px`);
  return side;
}
function stepTo(index) {
  if (!state.stepping) return;
  const values = axes.get(state.stepping);
  chosen[state.stepping] = Math.min(values.length - 1, Math.max(0, index));
  const text = valueName(state.stepping, values[chosen[state.stepping]]);
  $("step").value = chosen[state.stepping];
  $("step").setAttribute("aria-valuetext", text);
  $("step-value").textContent = text;
  showMatrix();
}
function refresh(focused) {
  showControls();
  showMatrix();
  if (focused) $(focused)?.focus();
}
let grid = []; // the pictures of the matrix by row and column, as zoom walks through them
function showMatrix() {
  const rowValues = state.rows ? axes.get(state.rows) : [undefined],
    columnValues = state.columns ? axes.get(state.columns) : [undefined];
  const drawnOn = (axis) => axis === "@prompt" || axis === "@seed";
  const base = (row, column) => {
    const c = at(row, column);
    return baseOf(c.prompt, c.seed);
  };
  const hasBase = [...drawn.values()].some((p) => p.run === null);
  const aboveColumns = hasBase && drawnOn(state.columns),
    besideRows = hasBase && drawnOn(state.rows) && !aboveColumns;
  const alone = hasBase && !aboveColumns && !besideRows; // one picture of the base stands for all cells
  const head = make("tr", {}, make("td"));
  if (besideRows || alone) head.append(make("th", { scope: "col" }, make("b", {}, say("base"))));
  columnValues.forEach((value) => head.append(heading("col", state.columns, value)));
  grid = [];
  const body = make("tbody");
  if (aboveColumns) {
    const row = make("tr", {}, make("th", { scope: "row" }, make("b", {}, say("base"))));
    grid.push(columnValues.map((value) => base(undefined, value)));
    columnValues.forEach((value, c) => row.append(cellOf(base(undefined, value), null, 0, c)));
    body.append(row);
  }
  for (const value of rowValues) {
    const row = make("tr", {}, heading("row", state.rows, value)),
      pictures = [],
      r = grid.length;
    if (besideRows || (alone && r === 0)) row.append(cellOf(base(value), null, r, 0));
    if (alone && r === 0) row.lastChild.rowSpan = rowValues.length;
    if (besideRows || alone) pictures.push(alone && r > 0 ? undefined : base(value));
    for (const other of columnValues) {
      const what = at(value, other),
        picture = what.run === undefined ? undefined : pictureOf(what.run, what.step, what.prompt, what.seed);
      row.append(cellOf(picture, what, r, pictures.length));
      pictures.push(picture);
    }
    grid.push(pictures);
    body.append(row);
  }
  $("matrix").replaceChildren(make("thead", {}, head), body);
  const first = $("matrix").querySelector("[data-at]");
  if (first) first.tabIndex = 0;
}
function heading(scope, axis, value) {
  const run =
    axis === "@run"
      ? value
      : KEYS.length === 1 && axis === KEYS[0]
        ? order.find((r) => same(runs[r].settings[axis], value))
        : undefined;
  const score = run === undefined ? null : measured(runs[run]);
  const isBest = best !== null && (run === best || (KEYS.includes(axis) && same(runs[best].settings[axis], value)));
  const name = (axis && !axis.startsWith("@")) || axis === "@seed" || axis === "@step" ? axisName(axis) : null;
  return make(
    "th",
    { scope, className: isBest ? "best" : "", title: valueName(axis, value) },
    name,
    ...(data.drawn && axis === "@run" ? valuesOf(runs[value]) : [make("b", {}, valueName(axis, value))]),
    score === null ? null : `${fixed(score)}${run === best ? ` ★` : ""}`,
  );
}
function valuesOf(run) {
  // a line for each swept key
  const line = (key) =>
    make("span", {}, `${key.replace(/^stage\./, "")} `, make("b", {}, number(run.settings[key])));
  return KEYS.length ? KEYS.map(line) : [make("b", {}, run.label)];
}
function cellOf(picture, what, r, c) {
  const run = what ? runs[what.run] : null;
  if (!picture) {
    const status = !what ? "no_picture" : !run ? "no_run" : run.status === "done" ? "no_picture" : run.status;
    const more =
      run?.status === "failed"
        ? run.error
        : run?.status === "unfinished"
          ? reached(run)
          : null;
    return make(
      "td",
      {},
      make("div", { className: `empty ${status}`, tabIndex: more ? 0 : -1 }, make("b", {}, say(status)), more),
    );
  }
  const button = make(
    "button",
    {
      type: "button",
      "aria-label": describe(picture),
      tabIndex: -1,
      "data-at": `${r},${c}`,
      onclick: () => zoom(picture, r, c),
    },
    image(picture),
  );
  const isMarked = marked.includes(picture);
  const tick = make(
    "button",
    {
      type: "button",
      className: "tick",
      tabIndex: -1,
      title: say("mark"),
      "aria-label": `${say("mark")}: ${describe(picture)}`,
      "aria-pressed": String(isMarked),
      onclick: () => mark(picture),
    },
    "✓",
  );
  const caption = [];
  if (
    run &&
    KEYS.includes(state.rows) &&
    KEYS.includes(state.columns) &&
    (measured(run) !== null || run.status === "failed")
  ) {
    const tied = data.ties.includes(what.run),
      star = what.run === best ? `★ ${say("winner")}` : tied ? say("tied") : run.fault ? say(run.fault) : "";
    caption.push(
      make(
        "p",
        {},
        make("span", {}, run.status === "failed" ? say("failed") : fixed(measured(run))),
        make("span", {}, star),
      ),
    );
  }
  for (const [name, value] of Object.entries(picture.details?.scores ?? {}))
    caption.push(make("p", {}, make("span", {}, say(name)), make("span", {}, fixed(value))));
  if (what?.found.length > 1) caption.push(make("p", {}, say("more_runs", { n: what.found.length - 1 })));
  return make(
    "td",
    {},
    make("div", { className: `cell ${what && what.run === best ? "best" : ""}` }, button, tick, ...caption),
  );
}
$("matrix").addEventListener("keydown", (event) => {
  const here = event.target.closest("[data-at]");
  if (!here) return;
  const [r, c] = here.dataset.at.split(",").map(Number);
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (event.key === "c" || event.key === "C") {
    mark(grid[r]?.[c]);
    $("matrix").querySelector(`[data-at="${r},${c}"]`)?.focus();
  }
  if (!move) return;
  event.preventDefault();
  const next = neighbour(r, c, ...move);
  if (!next) return;
  const button = $("matrix").querySelector(`[data-at="${next.join(",")}"]`);
  here.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
});
function neighbour(r, c, down, right) {
  for (r += down, c += right; r >= 0 && r < grid.length && c >= 0 && c < grid[r].length; r += down, c += right)
    if (grid[r][c]) return [r, c];
  return null;
}
