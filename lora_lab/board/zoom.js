// One picture enlarged, and two of them under a slider.

let zoomed = null; // { picture, r, c }
function zoom(picture, r = null, c = null) {
  zoomed = { picture, r, c };
  $("zoom-picture").src = path(picture.folder, picture.file, "png");
  $("zoom-picture").alt = describe(picture);
  $("zoom-title").textContent = nameOf(picture);
  const run = runs[picture.run],
    score = run ? measured(run) : null;
  $("zoom-text").textContent = [
    data.prompts[picture.prompt],
    stepOf(picture),
    seeds.length > 1 || picture.details ? `${say("seed_drawn")} ${picture.seed}` : null,
    score === null ? null : `${say(data.measure)} ${fixed(score)}`,
  ]
    .filter(Boolean)
    .join(" · ");
  showDetails(picture);
  const base = baseOf(picture.prompt, picture.seed),
    top = best === null ? null : pictureOf(best, LAST, picture.prompt, picture.seed);
  $("zoom-base").hidden = !base || picture.run === null;
  $("zoom-base").onclick = () => compare(base, picture);
  $("zoom-best").hidden = !top || top === picture;
  $("zoom-best").onclick = () => compare(picture, top);
  $("zoom-keys").textContent =
    r === null ? "" : state.stepping ? say("zoom_keys", { axis: axisName(state.stepping) }) : say("zoom_keys_plain");
  if (!$("zoom").open) $("zoom").showModal();
}
function showDetails(picture) {
  // the photo beside it, and what it was drawn from
  const { scores = {}, ...told } = picture.details ?? {};
  const shown = Object.entries({ ...told, ...scores }).map(([key, value]) => [
    say(key === "prompt" ? "prompt_text" : key),
    typeof value === "number" ? number(Number(value.toPrecision(3))) : value,
  ]);
  $("zoom-details").replaceChildren(
    ...shown.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]),
  );
  const photo = data.drawn && picture.run !== null ? baseOf(picture.prompt, picture.seed) : null;
  $("zoom-photo").hidden = !photo;
  if (photo) {
    $("zoom-photo").src = path(photo.folder, photo.file, "png");
    $("zoom-photo").alt = describe(photo);
  }
}
$("zoom").addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (event.key === "c" || event.key === "C") {
    mark(zoomed.picture);
    $("zoom").close();
  }
  if (!move || zoomed.r === null || zoomed.r < 0) return;
  event.preventDefault();
  const next = neighbour(zoomed.r, zoomed.c, ...move);
  if (next) zoom(grid[next[0]][next[1]], ...next);
});
$("zoom").addEventListener("close", () => {
  if (zoomed?.r !== null) $("matrix").querySelector(`[data-at="${zoomed.r},${zoomed.c}"]`)?.focus();
});
$("zoom-mark").onclick = () => {
  mark(zoomed.picture);
  $("zoom").close();
};
document.addEventListener("keydown", (event) => {
  // [ and ] step, wherever one is
  if (!"[]".includes(event.key) || $("slider").open || !state.stepping) return;
  stepTo(chosen[state.stepping] + (event.key === "]" ? 1 : -1));
  if ($("zoom").open && zoomed.r !== null && grid[zoomed.r]?.[zoomed.c])
    zoom(grid[zoomed.r][zoomed.c], zoomed.r, zoomed.c);
});
let marked = [];
function mark(picture) {
  if (!picture) return;
  marked = marked.includes(picture) ? marked.filter((p) => p !== picture) : [...marked, picture].slice(-2);
  showMarked();
  showMatrix();
}
function showMarked() {
  $("marked").hidden = !marked.length;
  $("marked-text").textContent = say(marked.length === 1 ? "marked_one" : "marked_two");
  $("marked-compare").hidden = marked.length < 2;
}
$("marked-compare").onclick = () => compare(...marked);
$("marked-clear").onclick = () => {
  marked = [];
  showMarked();
  showMatrix();
};
function compare(left, right) {
  $("over").src = path(left.folder, left.file, "png");
  $("over").alt = describe(left);
  $("under").src = path(right.folder, right.file, "png");
  $("under").alt = describe(right);
  const told = (p, other) =>
    [
      nameOf(p),
      p.run !== null && p.step !== other.step ? `${say("step")} ${p.step}` : null,
      p.prompt !== other.prompt ? data.prompts[p.prompt] : null,
      p.seed !== other.seed ? `${say("seed_drawn")} ${p.seed}` : null,
    ]
      .filter(Boolean)
      .join(" · ");
  $("left").textContent = told(left, right);
  $("right").textContent = told(right, left);
  $("border").value = 50;
  slide();
  $("zoom").close();
  $("slider").showModal();
  $("border").focus();
}
function slide() {
  $("pair").style.setProperty("--at", `${$("border").value}%`);
}
$("border").oninput = slide;
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-close]").onclick = () => dialog.close();
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  }); // beside it
}
