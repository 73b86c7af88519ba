"use strict";
// One screen at a time: the rater's number, the items in the rater's order, the end. What was given is kept in the
// browser's storage after each answer, so that a reload goes on; nothing is sent anywhere.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const strips = [...document.querySelectorAll("script.strip")].map((each) => each.textContent);
const style = document.querySelector("style").textContent;
const script = $("script").textContent;
const KEPT = `vidtwin-study ${data.study}`;
const TEXTS = {
  intro: data.alone
    ? "You see short clips, one after the other. Give each three scores, from 1 (bad) to 5 (perfect)."
    : "You see short clips beside their sources. Compare each with its source and give three scores, from 1 (bad) to 5 " +
      "(as the source).",
  care:
    "Next opens once a clip has been played to its end and has three scores. Some clips check attention. Rate on one " +
    "screen, in one place, without zooming the page.",
  keys:
    "Keys: 1–5 score the marked question and go on to the next, ↑ and ↓ change the question, Enter goes to the next " +
    "clip, Backspace to the one before, Space pauses, S saves.",
};

let rater = 0;
let progress = { started: "", place: 0, scores: {} };
let screens = [];
let marked = 0;
let shownAt = 0;
const clock = { frame: 0, playing: true, watched: false, due: 0 };

// --- storage ---

function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    report("This browser keeps nothing for this page: a reload would lose your scores. Save before you close it.");
  }
}

function isScore(value) {
  return Number.isInteger(value) && value >= data.scale[0] && value <= data.scale[data.scale.length - 1];
}

function resume(number) {
  rater = number;
  progress = { started: new Date().toISOString(), place: 0, scores: {} };
  const kept = recall(`${KEPT} ${rater}`);
  if (kept && typeof kept.scores === "object" && kept.scores) {
    for (const item of data.items) {
      const found = kept.scores[item.id];
      if (!found) {
        continue;
      }
      const entry = { milliseconds: Number.isInteger(found.milliseconds) ? found.milliseconds : 0 };
      for (const { key } of data.criteria) {
        if (isScore(found[key])) {
          entry[key] = found[key];
        }
      }
      progress.scores[item.id] = entry;
    }
    progress.started = String(kept.started);
    progress.place = Number.isInteger(kept.place) ? Math.min(Math.max(kept.place, 0), data.items.length) : 0;
  }
  keep(KEPT, { rater });
  show();
}

// --- screens ---

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function button(id, text, action) {
  const made = make("button", { id, type: "button" }, text);
  made.addEventListener("click", action);
  return made;
}

function report(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function item() {
  return data.items[data.orders[rater - 1][progress.place]];
}

function isRated(each) {
  const found = progress.scores[each.id];
  return Boolean(found) && data.criteria.every(({ key }) => isScore(found[key]));
}

function rated() {
  return data.items.filter(isRated).length;
}

function count() {
  $("progress").textContent = rater ? `Rater ${rater}: ${rated()} of ${data.items.length} rated` : "";
}

function start() {
  const field = make("input", { id: "rater", type: "number", min: 1, max: data.orders.length, required: true });
  const form = make(
    "form",
    { id: "start" },
    make("label", {}, `Your rater number, 1 to ${data.orders.length} `, field),
    make("button", { type: "submit" }, "Begin"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    report("");
    resume(Number(field.value));
  });
  $("main").replaceChildren(
    make("p", {}, TEXTS.intro),
    make("dl", {}, ...data.criteria.flatMap((each) => [make("dt", {}, each.label), make("dd", {}, each.question)])),
    make("p", {}, TEXTS.care),
    make("p", { className: "keys" }, TEXTS.keys),
    form,
  );
  screens = [];
  field.focus();
}

function show() {
  count();
  if (progress.place >= data.items.length) {
    finish();
    return;
  }
  const { source, shown } = item();
  screens = [];
  const views = make("div", { id: "views" });
  for (const [title, strip] of source === null ? [["Clip", shown]] : [["Source", source], ["Reconstruction", shown]]) {
    const canvas = make("canvas", { width: 1, height: 1 });
    const picture = new Image();
    screens.push({ canvas, picture, ready: false });
    views.append(make("figure", {}, canvas, make("figcaption", {}, title)));
    const screen = screens[screens.length - 1];
    picture.onload = () => {
      canvas.width = picture.naturalWidth;
      canvas.height = picture.naturalHeight / data.frames;
      screen.ready = true;
    };
    picture.onerror = () => report("A clip of this page can't be shown; ask for the page again.");
    picture.src = `data:image/webp;base64,${strips[strip]}`;
  }
  const questions = data.criteria.map(({ key, label, question }, number) => {
    const field = make("fieldset", {}, make("legend", {}, make("strong", {}, label), ` ${question}`));
    const scale = make("div", { className: "scale" }, "bad ");
    field.append(scale);
    for (const score of data.scale) {
      const radio = make("input", { type: "radio", name: key, value: score });
      radio.checked = (progress.scores[item().id] ?? {})[key] === score;
      radio.addEventListener("change", () => give(number, score));
      scale.append(make("label", {}, radio, ` ${score}`));
    }
    scale.append(data.alone ? "perfect" : "as the source");
    field.addEventListener("focusin", () => mark(number));
    return field;
  });
  $("main").replaceChildren(
    make("h2", {}, `Clip ${progress.place + 1} of ${data.items.length}`),
    views,
    ...questions,
    make(
      "div",
      { className: "controls" },
      button("back", "Previous", () => go(-1)),
      button("next", "Next", () => go(1)),
      button("play", "Pause", pause),
      button("save", "Save answers", save),
    ),
    make("p", { className: "note keys" }, TEXTS.keys),
  );
  Object.assign(clock, { frame: 0, playing: true, watched: isRated(item()), due: 0 });
  shownAt = performance.now();
  mark(0);
  enable();
}

function finish() {
  screens = [];
  const missing = data.items.length - rated();
  $("main").replaceChildren(
    make("h2", {}, missing ? `${missing} clips are not rated yet.` : "All clips are rated. Thank you."),
    make("p", {}, "Save your answers as a file and send it to the person who gave you this page."),
    make(
      "div",
      { className: "controls" },
      button("back", "Previous", () => go(-1)),
      button("save", "Save answers", save),
      button("other", "Rate as another rater", leave),
    ),
  );
  $("save").focus();
}

function leave() {
  rater = 0;
  keep(KEPT, {});
  count();
  start();
}

// --- answers ---

function mark(number) {
  marked = number;
  document.querySelectorAll("fieldset").forEach((each, place) => each.classList.toggle("marked", place === number));
}

function spend() {
  const now = performance.now();
  const found = (progress.scores[item().id] ??= { milliseconds: 0 });
  found.milliseconds += Math.round(now - shownAt);
  shownAt = now;
  return found;
}

function give(number, score) {
  const { key } = data.criteria[number];
  spend()[key] = score;
  document.querySelector(`input[name="${key}"][value="${score}"]`).checked = true;
  keep(`${KEPT} ${rater}`, progress);
  mark(Math.min(number + 1, data.criteria.length - 1));
  count();
  enable();
}

function enable() {
  $("back").disabled = progress.place === 0;
  $("next").disabled = !(clock.watched && isRated(item()));
  $("play").textContent = clock.playing ? "Pause" : "Play";
}

function go(step) {
  if (progress.place < data.items.length && screens.length) {
    spend();
  }
  progress.place = Math.min(Math.max(progress.place + step, 0), data.items.length);
  keep(`${KEPT} ${rater}`, progress);
  report("");
  show();
  scrollTo(0, 0);
}

function pause() {
  clock.playing = !clock.playing;
  clock.due = 0;
  enable();
}

// --- the file ---

const bytes = (text) => new TextEncoder().encode(text);
const hex = (buffer) => [...new Uint8Array(buffer)].map((each) => each.toString(16).padStart(2, "0")).join("");

async function digest() {
  const parts = [$("data").textContent, script, style, ...strips];
  return hex(await crypto.subtle.digest("SHA-256", bytes(parts.map((part) => `${part}\n`).join(""))));
}

async function seal(text) {
  const raw = Uint8Array.from(data.seal.match(/../g), (pair) => Number.parseInt(pair, 16));
  const key = await crypto.subtle.importKey("raw", raw, { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  return hex(await crypto.subtle.sign("HMAC", key, bytes(text)));
}

async function save() {
  const answers = {
    format: "vidtwin study answers",
    format_version: 1,
    study: data.study,
    page: await digest(),
    rater,
    started: progress.started,
    saved: new Date().toISOString(),
    items: data.orders[rater - 1]
      .map((place) => data.items[place])
      .filter(isRated)
      .map(({ id }) => {
        const found = progress.scores[id];
        return Object.fromEntries([
          ["id", id],
          ...data.criteria.map(({ key }) => [key, found[key]]),
          ["milliseconds", found.milliseconds],
        ]);
      }),
  };
  const file = { answers, seal: await seal(JSON.stringify(answers)) };
  const link = make("a", {
    href: URL.createObjectURL(new Blob([`${JSON.stringify(file, null, 1)}\n`], { type: "application/json" })),
    download: `answers-${data.study.slice(0, 6)}-rater${String(rater).padStart(2, "0")}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  report(
    answers.items.length < data.items.length
      ? `Saved ${answers.items.length} of ${data.items.length} clips. Go on and save again at the end.`
      : "",
  );
}

// --- keys and the clock ---

document.addEventListener("keydown", (event) => {
  if (!rater || event.ctrlKey || event.metaKey || event.altKey || $("start")) {
    return;
  }
  const onButton = document.activeElement instanceof HTMLButtonElement;
  const rating = screens.length > 0;
  const score = Number(event.key);
  if (rating && isScore(score)) {
    give(marked, score);
  } else if (rating && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    mark(Math.min(Math.max(marked + (event.key === "ArrowUp" ? -1 : 1), 0), data.criteria.length - 1));
  } else if (event.key === "Enter" && !onButton && rating && !$("next").disabled) {
    go(1);
  } else if (event.key === "Backspace" && progress.place > 0) {
    go(-1);
  } else if (event.key === " " && !onButton && rating) {
    pause();
  } else if (event.key.toLowerCase() === "s") {
    save();
  } else {
    return;
  }
  event.preventDefault();
});

function draw(now) {
  if (screens.length && screens.every(({ ready }) => ready)) {
    if (clock.playing && clock.due === 0) {
      clock.due = now + 1000 / data.fps;
    } else if (clock.playing && now >= clock.due) {
      clock.frame = (clock.frame + 1) % data.frames;
      clock.due = Math.max(clock.due + 1000 / data.fps, now);
      if (clock.frame === data.frames - 1 && !clock.watched) {
        clock.watched = true;
        enable();
      }
    }
    for (const { canvas, picture } of screens) {
      const height = canvas.height;
      canvas.getContext("2d").drawImage(picture, 0, -clock.frame * height);
    }
  }
  requestAnimationFrame(draw);
}

if (!globalThis.crypto?.subtle) {
  report("Open this page from disk or by https: without, the browser can't seal the answers.");
} else {
  const kept = recall(KEPT);
  if (kept && Number.isInteger(kept.rater) && kept.rater >= 1 && kept.rater <= data.orders.length) {
    resume(kept.rater);
  } else {
    start();
  }
  requestAnimationFrame(draw);
}
