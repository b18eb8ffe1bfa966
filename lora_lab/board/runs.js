// All runs: character against kept, their curves, and the table with their commands.

// ---- character against kept: a point for each run, which opens its row of the table

const MOST_INTERVALS = 40; // of more runs they would hide the points
function ticksOf(numbers) {
  // round numbers, at most eight, that enclose `numbers`
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const rough = (high - low || Math.abs(high) || 1) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = power * [1, 2, 5, 10].find((n) => n * power >= rough);
  const first = Math.floor(low / unit);
  return Array.from({ length: Math.max(1, Math.ceil(high / unit) - first) + 1 }, (_, i) => (first + i) * unit);
}
function positioned(node, [left, top]) {
  node.style.left = `${left}%`;
  node.style.top = `${top}%`;
  return node;
}
function showTradeoff() {
  $("tradeoff").hidden = !data.points.length;
  if (!data.points.length) return;
  const names = ["kept", "character"];
  const withIntervals = data.points.length <= MOST_INTERVALS;
  const ticks = names.map((name) =>
    ticksOf(data.points.flatMap((run) => runs[run].scores[name].slice(0, withIntervals ? 3 : 1))),
  );
  const [x, y] = ticks.map((all, axis) => (value) => {
    const share = (100 * (value - all[0])) / (all.at(-1) - all[0]);
    return axis ? 100 - share : share; // of the plot, from the left and from the top
  });
  const cross = (run) => {
    const [[kept, left, right], [character, bottom, top]] = names.map((name) => runs[run].scores[name]);
    return `M${x(left)} ${y(character)}H${x(right)}M${x(kept)} ${y(bottom)}V${y(top)}`;
  };
  const place = (run) => [x(runs[run].scores.kept[0]), y(runs[run].scores.character[0])];
  const grid = [...ticks[0].map((value) => `M${x(value)} 0V100`), ...ticks[1].map((value) => `M0 ${y(value)}H100`)];
  $("plot-grid").setAttribute("d", grid.join(""));
  $("plot-intervals").setAttribute("d", withIntervals ? data.points.map(cross).join("") : "");
  $("plot-frontier").setAttribute("d", `M${data.frontier.map((run) => place(run).join(" ")).join("L")}`);
  $("plot-ticks").replaceChildren(
    ...ticks[0].map((value) => positioned(make("span", {}, number(value)), [x(value), 100])),
    ...ticks[1].map((value) => positioned(make("span", { className: "y" }, number(value)), [0, y(value)])),
  );
  $("plot-points").replaceChildren(...data.points.map((run) => positioned(pointOf(run), place(run))));
  $("plot-points").firstChild.tabIndex = 0; // one stop for the whole plot
  $("plot-text").textContent = describeRun(data.frontier.includes(best) ? best : data.frontier[0]);
}
function pointOf(run) {
  const text = describeRun(run);
  const show = () => {
    $("plot-text").textContent = text;
  };
  return make("button", {
    type: "button",
    className: run === best ? "best" : data.frontier.includes(run) ? "frontier" : "",
    "aria-label": text,
    "data-point": run,
    title: text,
    tabIndex: -1,
    onfocus: show,
    onmouseenter: show,
    onclick: () => reveal(run),
  });
}
function describeRun(run) {
  const scores = ["character", "kept"].map((name) => {
    const [value, low, high] = runs[run].scores[name].map((value) => value.toFixed(2));
    return `${say(name)} ${value}${low === high ? "" : ` (${low}–${high})`}`;
  });
  return [...new Set([runs[run].name, runs[run].label]), ...scores].join(" · ");
}
$("plot-points").addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const points = [...$("plot-points").children];
  const next = points[points.indexOf(event.target) + move];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
function reveal(run) {
  // the row of the table, opened
  opened.add(run);
  revealed = run;
  showTable();
  const button = $("table").querySelector(`[data-run="${run}"] .open`);
  button.focus({ preventScroll: true });
  button.closest("tr").scrollIntoView({ block: "center" });
}

// ---- curves

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#b8679a", "#c98a00", "#3f9ad4", "#8a6fd1", "#808080"];
const few = runs.length <= COLOURS.length;
const colour = (run) => (few ? COLOURS[run] : run === best ? css("--accent") : css("--soft") + "66");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const charts = [];
function chart(figure, curve) {
  const shown = order.filter((run) => curve(runs[run])[0].length > 1).reverse(); // the best in front
  figure.hidden = !shown.length;
  if (!shown.length) return;
  const axis = {
    stroke: css("--soft"),
    grid: { stroke: css("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui",
  };
  const digits = (value) => (value === null ? "" : Number(value.toPrecision(2)).toString());
  const series = shown.map((run) => ({
    label: runs[run].label,
    stroke: colour(run),
    width: run === best ? 3 : 1.25,
    spanGaps: true,
    points: { show: false },
  }));
  const width = () => figure.clientWidth - 24;
  const plot = new uPlot(
    {
      width: width(),
      height: 260,
      legend: { show: false },
      cursor: { y: false, points: { show: false } },
      scales: { x: { time: false }, y: { distr: 3 } },
      axes: [axis, { ...axis, size: 60, values: (_, ticks) => ticks.map(digits) }],
      series: [{}, ...series],
    },
    uPlot.join(shown.map((run) => curve(runs[run]))),
    figure,
  );
  charts.push({ plot, resize: () => plot.setSize({ width: width(), height: 260 }) });
}
function showCurves() {
  charts.splice(0).forEach(({ plot }) => plot.destroy());
  $("curves").hidden = !runs.some((run) => run.curve[0].length > 1 || run.validation[0].length > 1);
  chart($("training-chart"), (run) => run.curve);
  chart($("validation-chart"), (run) => run.validation);
  const named = few ? order.filter((run) => runs[run].curve[0].length > 1) : best === null ? [] : [best];
  $("legend").replaceChildren(
    ...named.map((run) => {
      const line = make("i");
      line.style.background = colour(run);
      return make("li", {}, line, runs[run].label + (run === best ? ` ★` : ""));
    }),
  );
}
addEventListener("resize", () => charts.forEach(({ resize }) => resize()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showCurves);

// ---- the table

const scoreNames = [...new Set(runs.flatMap((run) => Object.keys(run.scores)))].sort(
  (a, b) => (b === data.measure) - (a === data.measure),
);
const has = (read) => runs.some((run) => read(run) !== null && read(run) !== undefined);
const columns = [
  { id: "run", text: () => say("run"), of: (run) => run.name },
  { id: "status", text: () => say("status"), of: (run) => run.status },
  ...KEYS.map((key) => ({ id: key, text: () => key, of: (run) => run.settings[key] })),
  ...scoreNames.map((name) => ({
    id: `score:${name}`,
    text: () => say(name),
    of: (run) => run.scores[name]?.[0] ?? null,
    down: true,
    name,
  })),
  ...["validation_loss", "loss", "seconds"]
    .filter((key) => has((run) => run[key]))
    .map((key) => ({ id: key, text: () => say(key), of: (run) => run[key] })),
];
function interval(value, low, high, from, to) {
  const share = (x) => `${(100 * Math.min(1, Math.max(0, (x - from) / (to - from || 1)))).toFixed(1)}%`;
  const range = make("i"),
    dot = make("b");
  range.style.left = share(low);
  range.style.right = `calc(100% - ${share(high)})`;
  dot.style.left = share(value);
  return make(
    "div",
    { className: "interval", title: `${fixed(value)} (${fixed(low)} – ${fixed(high)})` },
    make("span", {}, value.toFixed(2)),
    make("div", { className: "track", "aria-hidden": "true" }, range, dot),
  );
}
function bounds(name) {
  const all = runs.flatMap((run) => run.scores[name] ?? []);
  return [Math.min(0, ...all), Math.max(...all)];
}
let sorted = {
  id: data.measure === "validation_loss" ? "validation_loss" : data.measure ? `score:${data.measure}` : "run",
  down: !!data.measure && !lowerIsBetter,
};
const opened = new Set();
let revealed = null; // the run whose point was chosen
function ordered() {
  const { of } = columns.find((column) => column.id === sorted.id);
  const sign = sorted.down ? -1 : 1;
  return [...runs.keys()].sort((a, b) => {
    const [x, y] = [of(runs[a]), of(runs[b])];
    const [noX, noY] = [x, y].map((v) => v === null || v === undefined); // what is missing comes last, either way
    if (noX || noY) return noX - noY || a - b;
    return (
      sign *
        (typeof x === "number" && typeof y === "number"
          ? x - y
          : String(x).localeCompare(String(y), undefined, { numeric: true })) || a - b
    );
  });
}
function showTable() {
  $("table-note").textContent = say(scoreNames.length ? "table_note" : "table_note_plain");
  const head = make(
    "tr",
    {},
    ...columns.map((column) => {
      const button = make(
        "button",
        {
          type: "button",
          "data-sort": column.id,
          onclick: () => {
            sorted = { id: column.id, down: sorted.id === column.id ? !sorted.down : !!column.down };
            showTable();
            $("table")
              .querySelector(`[data-sort="${CSS.escape(column.id)}"]`)
              .focus();
          },
        },
        column.text(),
      );
      if (words[`about_${column.name}`]) button.title = say(`about_${column.name}`);
      const heading = make("th", { scope: "col" }, button);
      if (sorted.id === column.id) heading.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      return heading;
    }),
  );
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(
    ...ordered().flatMap((index) => (opened.has(index) ? [row(index), details(index)] : [row(index)])),
  );
}
function row(index) {
  const run = runs[index];
  const button = make(
    "button",
    {
      type: "button",
      className: "open",
      "aria-expanded": String(opened.has(index)),
      "aria-label": say("details", { run: run.label }),
      onclick: () => {
        if (!opened.delete(index)) opened.add(index);
        showTable();
        $("table").querySelector(`[data-run="${index}"] .open`).focus();
      },
    },
    run.name,
  );
  return make(
    "tr",
    { className: `${index === best ? "best" : ""} ${index === revealed ? "revealed" : ""}`, "data-run": index },
    ...columns.map((column) => {
      if (column.id === "run") return make("td", {}, button);
      if (column.id === "status") {
        const kind = index === best ? "best" : run.status,
          tied = data.ties.includes(index);
        const text = index === best ? `★ ${say("winner")}` : tied ? say("tied") : say(run.status);
        return make("td", {}, make("span", { className: `state ${kind}` }, text));
      }
      const value = column.of(run);
      if (column.name) {
        const score = run.scores[column.name];
        if (!score) return make("td", {}, "–");
        if (column.name === data.measure) return make("td", {}, interval(...score, ...bounds(column.name)));
        return make(
          "td",
          {},
          score[0].toFixed(2),
          " ",
          make("small", {}, `${score[1].toFixed(2)}–${score[2].toFixed(2)}`),
        );
      }
      if (column.id === "seconds") return make("td", {}, time(value));
      return make(
        "td",
        {},
        value === null || value === undefined ? "–" : column.id.endsWith("loss") ? value.toFixed(4) : number(value),
      );
    }),
  );
}
function details(index) {
  const run = runs[index],
    seed = seeds[0] ?? 0;
  const pictures = [...data.prompts.keys()]
    .map((p) => pictureOf(index, LAST, p, seed))
    .filter(Boolean)
    .slice(0, 4);
  const parts = [run.error ? make("p", { className: "error" }, run.error) : null];
  if (run.status === "unfinished")
    parts.push(make("p", { className: "note" }, reached(run)));
  if (pictures.length)
    parts.push(
      make(
        "div",
        { className: "strip" },
        make(
          "div",
          {},
          ...pictures.map((picture) =>
            make(
              "button",
              { type: "button", "aria-label": describe(picture), onclick: () => zoom(picture) },
              image(picture),
            ),
          ),
        ),
      ),
    );
  parts.push(
    ...commandList(run, ["use", "repeat", "go_on"]),
    make("p", { className: "note" }, `${say("folder")}: ${run.place}`),
  );
  return make(
    "tr",
    { className: "details" },
    make("td", { colspan: columns.length }, make("div", { className: "inner" }, ...parts.filter(Boolean))),
  );
}
