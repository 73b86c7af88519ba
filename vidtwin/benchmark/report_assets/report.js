"use strict";
// Sorts the tables, switches the plots, draws the clips' values and plays the clips. All it shows stands in #data and in the tables.
// Names may hold markup: text goes into the page as text only.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const shown = (value) => typeof value === "number" && Number.isFinite(value);

// JSON has no NaN and no infinity: they come as words.
for (const columns of Object.values(data.clips.values))
  for (const column of columns)
    column.forEach((value, clip) => {
      if (typeof value === "string") column[clip] = Number(value);
    });

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function mark(model) {
  return draw(
    "svg",
    { class: `mark ${model.colour} ${model.kind}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    draw("path", { d: data.markers[model.marker] }),
  );
}

function formatted(value, metric) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  return value.toFixed(metric.digits).replace(/^-(?=[0.]*$)/, "");
}

const titled = (metric) => metric.label + (metric.unit ? ` (${metric.unit})` : "");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
  if (chosen !== undefined) select.value = chosen;
}

// ---- Tables: a click on a header sorts, another one turns it round. ----

function sortTable(head, cell) {
  const first = cell.hasAttribute("data-descending") ? "descending" : "ascending";
  const other = first === "descending" ? "ascending" : "descending";
  const direction = cell.getAttribute("aria-sort") === first ? other : first;
  const place = cell.cellIndex;
  for (const each of head.cells) each.setAttribute("aria-sort", each === cell ? direction : "none");
  const body = head.closest("table").tBodies[0];
  const lines = [...body.rows].map((row) => ({
    row,
    group: Number(row.dataset.group),
    value: row.cells[place].dataset.value,
  }));
  const sign = direction === "ascending" ? 1 : -1;
  lines.sort((a, b) => a.group - b.group || compareValues(a.value, b.value, sign));
  body.append(...lines.map((line) => line.row));
  markGroups(body);
}

// Models that are not ranked stay below the trained ones, and what is not there below all values of its group.
function compareValues(a, b, sign) {
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  const [x, y] = [a, b].map((value) => Number(value.replace(/^(-?)inf$/, "$1Infinity")));
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y || 0);
}

function markGroups(body) {
  let before = null;
  for (const row of body.rows) {
    row.classList.toggle("first-of-group", before !== null && before !== row.dataset.group);
    before = row.dataset.group;
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  const head = table.tHead.rows[0];
  markGroups(table.tBodies[0]);
  for (const cell of head.cells) cell.querySelector("button").addEventListener("click", () => sortTable(head, cell));
}

// ---- Axis of the clips' values ----

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high * (1 + 1e-12); index++) ticks.push(index * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return ticks.map((value) => ({ value, text: value.toFixed(digits) }));
}

function padded(values, part) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const space = high > low ? (high - low) * part : Math.abs(high) * 0.1 || 1;
  return [low - space, high + space];
}

// ---- Clip by clip: up to 10,000 clips of each model, on a canvas. ----

const canvas = byId("clips"),
  tip = byId("clips-tip");
const clipsMetric = byId("clips-metric"),
  clipsOrder = byId("clips-order");
const hiddenModels = new Set();
const FRAME = { left: 58, right: 12, top: 10, bottom: 34 };
let order = []; // clips from worst to best, or by rising content
let points = { x: [], y: [], clip: [], model: [] }; // in pixels, those that are drawn
let chosen = null;

const currentMetric = () => data.metrics.find((each) => each.key === clipsMetric.value);
const columns = () => data.clips.values[clipsMetric.value] || [];

// What is in the clips, if they are ordered by it.
const contentInOrder = () =>
  clipsOrder.value.startsWith("content") ? data.content[Number(clipsOrder.value.slice(7))] : null;

function sortClips() {
  const metric = currentMetric();
  const content = contentInOrder();
  const used = content
    ? [content.values]
    : clipsOrder.value === "mean"
      ? columns().filter((_, model) => !hiddenModels.has(model))
      : [columns()[Number(clipsOrder.value)]];
  const score = data.clips.names.map((_, clip) => {
    const values = used.map((column) => column[clip]).filter(shown);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN;
  });
  const sign = content || metric.higher ? 1 : -1;
  order = score.map((_, clip) => clip);
  order.sort((a, b) => Number.isNaN(score[a]) - Number.isNaN(score[b]) || sign * (score[a] - score[b]) || a - b);
}

function drawClips() {
  const metric = currentMetric();
  if (!metric) return;
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth,
    height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const visible = columns()
    .map((column, model) => ({ column, model }))
    .filter(({ model }) => !hiddenModels.has(model));
  const values = visible.flatMap(({ column }) => column.filter(shown));
  points = { x: [], y: [], clip: [], model: [] };
  byId("clips-note").textContent = clipsNote(metric, visible);
  if (!values.length) return;

  const [low, high] = padded(values, 0.06);
  const inner = { width: width - FRAME.left - FRAME.right, height: height - FRAME.top - FRAME.bottom };
  const atX = (rank) => FRAME.left + ((rank + 0.5) / order.length) * inner.width;
  const atY = (value) => FRAME.top + (1 - (value - low) / (high - low)) * inner.height;
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = colour("ink");
  pen.strokeStyle = colour("line");
  for (const tick of linearTicks(low, high, 6)) {
    const y = Math.round(atY(tick.value)) + 0.5;
    stroke(pen, FRAME.left, y, width - FRAME.right, y);
    pen.textAlign = "right";
    pen.fillText(tick.text, FRAME.left - 6, y + 4);
  }
  pen.textAlign = "left";
  const content = contentInOrder();
  pen.fillText(content ? "← least" : "← worst clips", FRAME.left, height - 10);
  pen.textAlign = "right";
  pen.fillText(content ? "most →" : "best clips →", width - FRAME.right, height - 10);
  pen.textAlign = "center";
  pen.save();
  pen.translate(14, FRAME.top + inner.height / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(metric.higher ? `${titled(metric)}, better →` : `← better, ${titled(metric)}`, 0, 0);
  pen.restore();
  if (chosen !== null) {
    const x = atX(order.indexOf(chosen));
    pen.strokeStyle = colour("ink");
    stroke(pen, x, FRAME.top, x, height - FRAME.bottom);
  }
  const spacing = inner.width / order.length;
  const size = spacing > 4 ? 1 : spacing > 1.5 ? 0.6 : 0.35;
  for (const { column, model } of visible) {
    const stamp = stampOf(data.models[model], size, ratio);
    const half = stamp.width / ratio / 2;
    order.forEach((clip, rank) => {
      if (!shown(column[clip])) return;
      const [x, y] = [atX(rank), atY(column[clip])];
      pen.drawImage(stamp, x - half, y - half, 2 * half, 2 * half);
      points.x.push(x);
      points.y.push(y);
      points.clip.push(clip);
      points.model.push(model);
    });
  }
  pen.strokeStyle = colour("ink");
  points.clip.forEach((clip, index) => {
    if (clip !== chosen) return;
    pen.beginPath();
    pen.arc(points.x[index], points.y[index], 8, 0, 2 * Math.PI);
    pen.stroke();
  });
}

function stroke(pen, x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}

// A marker is drawn once and stamped for each clip, which is ten times as fast as filling 50,000 outlines.
function stampOf(model, size, ratio) {
  const stamp = document.createElement("canvas");
  stamp.width = stamp.height = Math.ceil(16 * size * ratio);
  const pen = stamp.getContext("2d");
  pen.translate(stamp.width / 2, stamp.height / 2);
  pen.scale(size * ratio, size * ratio);
  pen.fillStyle = pen.strokeStyle = colour(model.colour);
  pen.lineWidth = 1.5;
  const outline = new Path2D(data.markers[model.marker]);
  if (model.kind !== "untrained") pen.fill(outline);
  pen.stroke(outline);
  return stamp;
}

function clipsNote(metric, visible) {
  const total = data.clips.names.length;
  const parts = [`${total.toLocaleString("en")} clip${total === 1 ? "" : "s"}. A click on a point shows its clip.`];
  if (data.clips.partial.length)
    parts.push(
      `${data.clips.partial.length.toLocaleString("en")} of them without numbers of every ranked model, so not in the means.`,
    );
  let broken = 0;
  for (const { column } of visible)
    for (const value of column) if (typeof value === "number" && !Number.isFinite(value)) broken++;
  if (broken) parts.push(`${broken} values of ${metric.label} are not finite and not drawn.`);
  if (!visible.some(({ column }) => column.some(shown))) parts.push(`No shown model has ${metric.label} of a clip.`);
  return parts.join(" ");
}

function nearest(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  let [best, distance] = [-1, 24 ** 2];
  for (let index = 0; index < points.x.length; index++) {
    const found = (points.x[index] - x) ** 2 + (points.y[index] - y) ** 2;
    if (found < distance) [best, distance] = [index, found];
  }
  return best;
}

function showTip(event) {
  const index = nearest(event);
  tip.hidden = index < 0;
  if (index < 0) return;
  const [clip, model] = [points.clip[index], points.model[index]];
  const value = formatted(columns()[model][clip], currentMetric());
  tip.textContent = `${data.models[model].name}: ${value} — ${data.clips.names[clip]}`;
  const below = points.y[index] < 60;
  tip.style.left = `${Math.min(points.x[index] + 10, canvas.clientWidth - tip.offsetWidth)}px`;
  tip.style.top = `${points.y[index] + (below ? 12 : -12 - tip.offsetHeight)}px`;
}

function setUpClips() {
  const perClip = data.metrics.filter((metric) => metric.perClip);
  if (!perClip.length || !data.clips.names.length) {
    byId("clips").closest("section").hidden = true;
    return;
  }
  options(
    clipsMetric,
    perClip.map((metric) => [metric.key, titled(metric)]),
  );
  options(clipsOrder, [
    ["mean", "the mean of the shown models"],
    ...data.models.map((model, index) => [index, model.name]),
    ...data.content.map((each, index) => [`content${index}`, `${each.label} of the clip, rising`]),
  ]);
  const trained = data.models.some((model) => model.kind === "trained");
  data.models.forEach((model, index) => {
    if (trained && model.kind !== "trained") hiddenModels.add(index);
    const box = make("input", { type: "checkbox" });
    box.checked = !hiddenModels.has(index);
    box.addEventListener("change", () => {
      hiddenModels[box.checked ? "delete" : "add"](index);
      redrawClips();
    });
    byId("clips-models").append(make("label", {}, box, mark(model), model.name));
  });
  clipsMetric.addEventListener("change", redrawClips);
  clipsOrder.addEventListener("change", redrawClips);
  canvas.addEventListener("pointermove", showTip);
  canvas.addEventListener("pointerleave", () => {
    tip.hidden = true;
  });
  canvas.addEventListener("click", (event) => {
    const index = nearest(event);
    if (index >= 0) showClip(points.clip[index]);
  });
  canvas.addEventListener("keydown", (event) => {
    const at = order.indexOf(chosen);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: order.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    showClip(order[Math.max(0, Math.min(order.length - 1, to))]);
  });
  sortClips();
  const first = data.players?.clips.find((kept) => kept.clip !== null);
  showClip(first ? first.clip : order[0]);
}

function redrawClips() {
  sortClips();
  drawClips();
}

// ---- The chosen clip: its numbers and, where the sweep kept it, its players. ----

function showClip(clip) {
  chosen = clip;
  const name = data.clips.names[clip],
    start = data.clips.starts[clip];
  const kept = data.players?.clips.find((each) => each.clip === clip);
  byId("clip-name").textContent = name;
  byId("clip-facts").textContent =
    `From frame ${start}; number ${order.indexOf(clip) + 1} of ${order.length} in this order` +
    (data.clips.partial.includes(clip) ? "; without numbers of every ranked model, so not in the means." : ".") +
    data.content.map((each) => ` ${each.label}: ${shown(each.values[clip]) ? Number(each.values[clip].toPrecision(3)) : "unknown"}.`).join("");
  byId("clip-numbers").replaceChildren(numbersOf(clip));
  byId("players").hidden = !kept;
  byId("no-players").hidden = Boolean(kept);
  byId("no-players").textContent = data.players
    ? "No players: a sweep keeps the pictures of a few clips only, which the buttons above show."
    : "This results folder holds no players.";
  for (const button of byId("kept").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(data.players.clips[Number(button.dataset.kept)] === kept));
  playersOf(kept);
  drawClips();
}

function numbersOf(clip) {
  const metrics = data.metrics.filter((metric) => metric.perClip);
  const head = make(
    "tr",
    {},
    make("th", { scope: "col" }, "Model"),
    ...metrics.map((metric) => make("th", { scope: "col" }, titled(metric))),
  );
  const body = data.models.map((model, index) =>
    make(
      "tr",
      { class: model.kind },
      make("th", { scope: "row" }, make("div", { class: "named" }, mark(model), make("span", {}, model.name))),
      ...metrics.map((metric) => make("td", {}, formatted(data.clips.values[metric.key][index][clip], metric))),
    ),
  );
  return make("table", { class: "numbers" }, make("thead", {}, head), make("tbody", {}, ...body));
}

const clock = { playing: false, position: 0, frame: -1, last: 0 };
let screens = []; // {pen, strip, height}

function setUpPlayers() {
  if (!data.players) return;
  const place = byId("kept");
  place.hidden = false;
  data.players.clips.forEach((kept, index) => {
    const button = make(
      "button",
      { type: "button", "data-kept": index, "aria-pressed": "false" },
      `${kept.why}: ${kept.name}, frame ${kept.start}`,
    );
    button.disabled = kept.clip === null;
    button.addEventListener("click", () => showClip(kept.clip));
    place.append(button);
  });
  byId("frame").max = data.players.frames - 1;
  byId("frame").addEventListener("input", (event) => goTo(Number(event.target.value)));
  byId("play").addEventListener("click", togglePlaying);
  byId("back").addEventListener("click", () => goTo(clock.frame - 1));
  byId("forth").addEventListener("click", () => goTo(clock.frame + 1));
  byId("size").addEventListener("change", sizeScreens);
  byId("players").addEventListener("keydown", (event) => {
    if (event.target.matches("select, #frame") || (event.key === " " && event.target.matches("button"))) return;
    if (event.key === " ") togglePlaying();
    else if (event.key === "ArrowLeft") goTo(clock.frame - 1);
    else if (event.key === "ArrowRight") goTo(clock.frame + 1);
    else return;
    event.preventDefault();
  });
}

const ROWS = [
  ["input reconstruction", "Input and reconstructions"],
  ["error", "Error"],
  ["partial", "Each latent alone"],
];

function playersOf(kept) {
  screens = [];
  byId("views").replaceChildren();
  if (!kept) return setPlaying(false);
  const known = ROWS.map(([kinds]) => kinds.split(" ")).flat();
  const others = [...new Set(kept.views.map((view) => view.kind))].filter((kind) => !known.includes(kind));
  for (const [kinds, title] of [...ROWS, ...others.map((kind) => [kind, kind])]) {
    const views = kept.views.filter((view) => kinds.split(" ").includes(view.kind));
    if (!views.length) continue;
    const row = make("div", { class: "views" }, ...views.map(screenOf));
    if (kinds === "error") row.prepend(make("figure", { class: "gap" })); // each error below its reconstruction
    byId("views").append(make("h4", {}, title), row);
  }
  goTo(0);
}

// A view's frames stand below each other in one picture.
function screenOf(view) {
  const screen = make("canvas", { role: "img", "aria-label": view.title, width: 1, height: 1 });
  const model = data.models.find((each) => each.name === view.model);
  const strip = new Image();
  const entry = { screen, pen: screen.getContext("2d"), strip, ready: false };
  screens.push(entry);
  strip.addEventListener("load", () => {
    entry.ready = true;
    screen.width = strip.naturalWidth;
    screen.height = strip.naturalHeight / data.players.frames;
    sizeScreens();
    paint(entry);
  });
  strip.addEventListener("error", () => {
    caption.append(" (this picture can't be read)");
  });
  const caption = make("figcaption", {}, ...(model ? [mark(model)] : []), view.title);
  strip.src = `data:image/webp;base64,${byId(`strip-${view.strip}`).textContent}`;
  return make("figure", {}, caption, screen);
}

function sizeScreens() {
  const wanted = Number(byId("size").value);
  for (const figure of document.querySelectorAll("#views figure")) figure.style.width = `${wanted}px`;
  for (const { screen } of screens) {
    screen.classList.toggle("enlarged", wanted > screen.width);
  }
}

function paint(entry) {
  if (!entry.ready) return;
  const { width, height } = entry.screen;
  entry.pen.drawImage(entry.strip, 0, clock.frame * height, width, height, 0, 0, width, height);
}

function goTo(position) {
  const count = data.players.frames;
  clock.position = ((position % count) + count) % count;
  const frame = Math.floor(clock.position);
  clock.frame = frame;
  screens.forEach(paint);
  byId("frame").value = frame;
  byId("time").textContent = `frame ${frame + 1} of ${count}, ${(frame / data.players.fps).toFixed(2)} s`;
}

function togglePlaying() {
  setPlaying(!clock.playing);
}

function setPlaying(playing) {
  if (playing && !clock.playing) {
    clock.last = performance.now();
    requestAnimationFrame(tick);
  }
  clock.playing = playing;
  byId("play").textContent = playing ? "Pause" : "Play";
}

function tick(now) {
  if (!clock.playing) return;
  const passed = Math.max(0, now - clock.last) / 1000;
  clock.last = now;
  const position = clock.position + passed * data.players.fps * Number(byId("speed").value);
  if (Math.floor(position) !== clock.frame) goTo(position);
  else clock.position = position;
  requestAnimationFrame(tick);
}

// ---- Start ----

const plots = byId("plots");
plots?.addEventListener("change", () => {
  document.querySelectorAll(".drawing").forEach((drawing, index) => {
    drawing.hidden = index !== plots.selectedIndex;
  });
});
setUpPlayers();
setUpClips();

let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  drawClips();
}).observe(document.body);
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", drawClips);

// On paper all that is folded is open.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((details) => {
    details.open = true;
  });
});
addEventListener("afterprint", () =>
  folded.forEach((details) => {
    details.open = false;
  }),
);
performance.mark("report-ready");
