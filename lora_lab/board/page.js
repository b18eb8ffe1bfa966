// Data, words and pictures, the first screen and the language. The page's data is #data, every text is data.words.
// page.js, matrix.js, zoom.js and runs.js are one script in the page: no build step, and no library but uPlot.
// Objects have no prototype, because a score or a setting may be called "constructor".
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const data = JSON.parse(document.getElementById("data").textContent, (_, value) =>
  isObject(value) ? Object.assign(Object.create(null), value) : value,
);
const { runs, words, swept } = data;
const $ = (id) => document.getElementById(id);
const KEYS = Object.keys(swept);
const LAST = "last";
const lowerIsBetter = data.measure === "validation_loss";
const best = data.ranking.length ? data.ranking[0] : null;
let language = (remembered("language") || navigator.language || "en").startsWith("ko") ? "ko" : "en";

function remembered(key) {
  try {
    return localStorage.getItem(`lora_lab.${key}`);
  } catch {
    return null;
  } // file:// may forbid it
}
function remember(key, value) {
  try {
    localStorage.setItem(`lora_lab.${key}`, value);
  } catch {
    /* then not */
  }
}
function say(key, values = {}) {
  const word = (data.drawn && words[`${key}_drawn`]) || words[key]; // as page.word
  const text = word ? word[language] : key.replaceAll("_", " ");
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key.startsWith("data-") || ["scope", "role", "colspan", "for"].includes(key)) {
      node.setAttribute(key, value);
    } else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const number = (value) => {
  // as verdict.shown
  if (typeof value !== "number") return String(value);
  const text = Number(value.toPrecision(6));
  return text !== 0 && (Math.abs(text) < 1e-3 || Math.abs(text) >= 1e6)
    ? text.toExponential().replace("e+", "e")
    : String(text);
};
const fixed = (value) =>
  value === null || value === undefined ? "–" : lowerIsBetter ? value.toFixed(4) : value.toFixed(2);
const measured = (run) =>
  (data.measure === "validation_loss" ? run.validation_loss : run.scores[data.measure]?.[0]) ?? null;
const time = (s) =>
  s === null
    ? "–"
    : s < 90
      ? `${Math.round(s)} s`
      : s < 5400
        ? `${Math.round(s / 60)} min`
        : `${(s / 3600).toFixed(1)} h`;
const path = (folder, file, suffix) => `page/${encodeURIComponent(folder)}/${encodeURIComponent(file)}.${suffix}`;

// ---- pictures: found by run, step, prompt and seed. With data.drawn a prompt is a photo: its name, and in place of the
// base's picture itself, whatever the seed.

const drawn = new Map();
runs.forEach((run, index) =>
  run.pictures.forEach(([step, prompt, seed, file, thumbnail, details]) => {
    const owner = step < 0 ? "base" : index;
    const picture = { run: step < 0 ? null : index, step, prompt, seed, folder: run.folder, file, thumbnail, details };
    const key = `${owner}/${step}/${prompt}/${step < 0 && data.drawn ? "" : seed}`;
    if (!drawn.has(key)) drawn.set(key, picture);
  }),
);
const steps = [...new Set([...drawn.values()].map((p) => p.step).filter((s) => s >= 0))].sort((a, b) => a - b);
const seeds = [...new Set([...drawn.values()].filter((p) => p.step >= 0 || !data.drawn).map((p) => p.seed))].sort((a, b) => a - b);
const lastStep = runs.map((run) => Math.max(-1, ...run.pictures.map((p) => p[0])));
const pictureOf = (run, step, prompt, seed) =>
  drawn.get(`${run}/${step === LAST ? lastStep[run] : step}/${prompt}/${seed}`);
const baseOf = (prompt, seed) => drawn.get(`base/-1/${prompt}/${data.drawn ? "" : seed}`);
const stepOf = (picture) => (picture.run === null || data.drawn ? null : `${say("step")} ${picture.step}`);
const reached = (run) =>
  say("reached", { step: data.drawn ? run.pictures.filter(([step]) => step >= 0).length : run.step, steps: run.steps });
const nameOf = (picture) => (picture.run === null ? say("base") : runs[picture.run].label);
const describe = (p) =>
  [
    nameOf(p),
    stepOf(p),
    data.prompts[p.prompt],
    seeds.length > 1 ? `${say("prompt")}/${say("seed_drawn")} ${p.seed}` : null,
  ]
    .filter(Boolean)
    .join(" · ");
function image(picture, suffix = picture.thumbnail) {
  return make("img", {
    loading: "lazy",
    decoding: "async",
    alt: describe(picture),
    src: path(picture.folder, picture.file, suffix),
  });
}

// A page that was sent without its large pictures shows the small ones.
document.addEventListener(
  "error",
  ({ target }) => {
    if (target.src?.endsWith(".png")) target.src = target.src.replace(/png$/, "webp");
  },
  true,
);

// ---- the first screen

function commandList(run, only = ["use", "repeat", "go_on"]) {
  return only
    .filter((name) => run.commands[name])
    .map((name) => {
      const button = make(
        "button",
        { type: "button", className: "copy", "aria-label": `${say("copy")}: ${say(name)}` },
        say("copy"),
      );
      button.onclick = () => copy(run.commands[name], button);
      return make(
        "div",
        { className: "command" },
        make("span", {}, say(name)),
        make("div", {}, make("code", { tabIndex: 0 }, run.commands[name]), button),
      );
    });
}
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // file:// in some browsers
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = say("copied");
  setTimeout(() => {
    button.textContent = say("copy");
  }, 1500);
}
function showVerdict() {
  const count = (status) => runs.filter((run) => run.status === status).length;
  const told = ["done", "failed", "unfinished", "missing"]
    .filter(count)
    .map((status) => `${count(status)} ${say(status)}`);
  $("counts").textContent = [say(runs.length === 1 ? "run_count" : "runs_count", { n: runs.length }), ...told].join(
    " · ",
  );
  $("eyebrow").textContent = say(
    best === null ? "no_winner" : count("unfinished") + count("missing") ? "best_so_far" : "best_run",
  );
  $("sentence").textContent = data.sentence[language];
  const run = runs[best];
  if (run) {
    const told = KEYS.map((key) => make("span", {}, make("small", {}, key), " ", number(run.settings[key])));
    $("winner").replaceChildren(...(told.length ? told : [run.label]));
    $("commands").replaceChildren(...commandList(run, ["use"]));
  } else $("winner").textContent = say("page");
  const wanted = [...data.prompts.keys()].slice(0, 4),
    seed = seeds[0] ?? 0;
  const strip = (title, pictures, name = "") =>
    pictures.length
      ? make("div", { className: `strip ${name}` }, make("h3", {}, title), make("div", {}, ...pictures))
      : null;
  const button = (picture) =>
    make(
      "button",
      { type: "button", "aria-label": describe(picture), onclick: () => zoom(picture) },
      image(picture, "png"),
    );
  $("strips").replaceChildren(
    ...[
      strip(
        say("training_pictures"),
        data.training.map((file) => make("img", { src: `page/training/${file}`, alt: say("training_pictures") })),
      ),
      best === null
        ? null
        : strip(
            `${say("this_run")}: ${run.label}`,
            wanted
              .map((p) => pictureOf(best, LAST, p, seed))
              .filter(Boolean)
              .map(button),
            "best",
          ),
      strip(
        say("base"),
        wanted
          .map((p) => baseOf(p, seed))
          .filter(Boolean)
          .map(button),
      ),
    ].filter(Boolean),
  );
}
function showEffects() {
  const reach = lowerIsBetter ? Math.min : Math.max;
  const judged = runs.filter((run) => run.status === "done" && measured(run) !== null);
  $("effects").hidden = judged.length < 2 || !KEYS.length;
  $("effects-note").textContent =
    say("effects_note", { measure: say(data.measure ?? "") }) + (lowerIsBetter ? ` (${say("lower_is_better")})` : "");
  $("cards").replaceChildren(
    ...KEYS.map((key) => {
      const chosen = swept[key].map((value) => {
        const those = judged.filter((run) => same(run.settings[key], value));
        const top = reach(...those.map(measured));
        return those.find((run) => measured(run) === top);
      });
      const highest = chosen.map((run) => (run ? measured(run) : null));
      const known = highest.filter((value) => value !== null);
      const top = reach(...known),
        widest = Math.max(...known.map(Math.abs)) || 1;
      return make(
        "div",
        { className: "card" },
        make("h3", {}, key),
        ...swept[key].map((value, i) => {
          const bar = make("i");
          bar.style.width = `${Math.max(0, (100 * highest[i]) / widest)}%`;
          return make(
            "div",
            { className: highest[i] === top ? "bar best" : "bar" },
            make("span", { title: number(value) }, number(value)),
            make("span", {}, highest[i] === null ? null : bar, chosen[i]?.fault ? say(chosen[i].fault) : null),
            make("span", {}, fixed(highest[i])),
          );
        }),
      );
    }),
  );
}

// ---- language

function translate() {
  document.documentElement.lang = language;
  document.title = `${data.title} – ${say("page")}`;
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = say(node.dataset.word);
  for (const node of document.querySelectorAll("[data-aria]")) node.setAttribute("aria-label", say(node.dataset.aria));
  $("language").textContent = say("language");
  $("language").lang = language === "ko" ? "en" : "ko";
  showVerdict();
  showEffects();
  showControls();
  showMatrix();
  showTradeoff();
  showCurves();
  showTable();
  showMarked();
}
$("language").onclick = () => {
  language = language === "ko" ? "en" : "ko";
  remember("language", language);
  translate();
};
