"use strict";
// All text of files goes into the page as text (textContent), never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const two = data.names.length === 2;
const PER_PAGE = 50;
// Okabe and Ito's colours, told apart by colour-blind readers too; more experts repeat them darker.
const PALETTE = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0],
                 [204, 121, 167], [120, 120, 120]];
const byId = (id) => document.getElementById(id);

const questions = data.questions.map(([id, suite, set, picture, question, rest, label, ...answers]) => ({
  id, suite: data.strings[suite], set: data.strings[set], picture: data.pictures[picture],
  question: data.strings[question], rest: data.strings[rest], label: data.strings[label],
  runs: data.names.map((_, run) => {
    const [answer, read, value, cut] = answers.slice(4 * run, 4 * run + 4);
    return {answer: data.strings[answer], read: data.strings[read], value, cut};
  }),
}));
for (const one of questions) {
  one.key = `${one.suite}/${one.id}`;
  one.searched = [one.question, one.picture.name, one.label, ...one.runs.map((run) => run.answer)].join("\n").toLowerCase();
}

const known = (run) => run.value !== null;
const right = (run) => known(run) && run.value >= 1;
const wrong = (run) => known(run) && run.value <= 0;
const partly = (run) => known(run) && run.value > 0 && run.value < 1;
const change = (one) => one.runs.every(known) ? Math.sign(one.runs[1].value - one.runs[0].value) : 0;
const some = (test) => (one) => one.runs.some(test);
const every = (test) => (one) => one.runs.every(test);
const SHOW = {
  all: ["all", () => true],
  ...(two ? {
    flipped: ["flipped: B better or worse", (one) => change(one) !== 0],
    better: ["flipped: B better", (one) => change(one) > 0],
    worse: ["flipped: B worse", (one) => change(one) < 0],
    right: ["both right", every(right)],
    wrong: ["both wrong", every(wrong)],
  } : {right: ["right", every(right)], wrong: ["wrong", every(wrong)]}),
  partly: ["partly right", some(partly)],
  unscored: ["not scored by itself", some((run) => !known(run))],
  cut: ["cut answers", some((run) => run.cut)],
  empty: ["empty answers", some((run) => run.answer === "")],
};
const OFTEN_NONE = ["partly", "unscored", "cut", "empty"];  // offered only where there are such

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function offer(select, options) {
  select.replaceChildren(...options.map(([value, words]) => element("option", {value, textContent: words})));
}

let found = [];
let chosen = 0;  // of found
let layer = null, alone = false;  // of the map

function offerSets() {
  const suite = byId("suite").value;
  const sets = new Set(questions.filter((one) => !suite || one.suite === suite).map((one) => one.set));
  const before = byId("set").value;
  offer(byId("set"), [["", "all"], ...[...sets].map((set) => [set, set])]);
  byId("set").value = sets.has(before) ? before : "";
}

function filter(key) {
  const [suite, set, text] = ["suite", "set", "text"].map((id) => byId(id).value);
  const test = SHOW[byId("show").value][1], words = text.trim().toLowerCase();
  found = questions.filter((one) => test(one) && (!suite || one.suite === suite) && (!set || one.set === set) &&
                                    (!words || one.searched.includes(words)));
  chosen = Math.max(0, found.findIndex((one) => one.key === key));
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${questions.length.toLocaleString("en")} questions`;
  drawList();
}

const image = (picture, className) => picture.src
  ? element("img", {src: picture.src, className, alt: ""})
  : element("div", {className: `${className} absent`, textContent: className === "thumb" ? "?" : picture.note});

function verdict(run) {
  const [name, words] = !known(run) ? ["", "not scored"] : right(run) ? ["right", "✓ right"] :
    wrong(run) ? ["wrong", "✗ wrong"] : ["partly", `${Math.round(100 * run.value)}% right`];
  return element("span", {className: name, textContent: words});
}

function row(one, index) {
  const lines = one.runs.map((run, number) => element("span", {className: "line"}, verdict(run),
    `${two ? ` ${"AB"[number]}` : ""}: ${run.answer || "(empty answer)"}`));
  const item = element("li", {id: `question-${index}`}, image(one.picture, "thumb"),
    element("div", {}, element("span", {className: "question", textContent: one.question}), ...lines));
  item.setAttribute("role", "option");
  item.addEventListener("click", () => choose(index));
  return item;
}

function drawList() {
  const page = Math.floor(chosen / PER_PAGE), start = page * PER_PAGE;
  byId("list").replaceChildren(...found.slice(start, start + PER_PAGE).map((one, index) => row(one, start + index)));
  byId("list").scrollTop = 0;
  byId("page").textContent = found.length
    ? `${start + 1} to ${Math.min(start + PER_PAGE, found.length)} of ${found.length.toLocaleString("en")}` : "none";
  byId("previous").disabled = page === 0;
  byId("next").disabled = start + PER_PAGE >= found.length;
  mark();
}

function choose(index) {
  if (!found.length) return;
  index = Math.min(Math.max(index, 0), found.length - 1);
  const turned = Math.floor(index / PER_PAGE) !== Math.floor(chosen / PER_PAGE);
  byId(`question-${chosen}`)?.setAttribute("aria-selected", "false");
  chosen = index;
  turned ? drawList() : mark();
}

function mark() {
  const list = byId("list"), item = byId(`question-${chosen}`);
  if (item) {
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
    const below = item.offsetTop + item.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
  } else list.removeAttribute("aria-activedescendant");
  drawDetail();
  remember();
}

function drawDetail() {
  const one = found[chosen];
  if (!one) return byId("detail").replaceChildren();
  const facts = element("dl");
  const fact = (name, ...content) => facts.append(element("dt", {textContent: name}), element("dd", {}, ...content));
  fact("question", one.question);
  if (one.rest) fact("asked with", one.rest);
  fact("right answer", one.label);
  one.runs.forEach((run, number) => {
    const whose = two ? `${"AB"[number]} ` : "";
    fact(`${whose}answer`, run.answer || "(empty answer)", run.cut ? " (cut at max_new_tokens)" : "");
    fact(`${whose}read as`, `${run.read || "(nothing)"} `, verdict(run));
  });
  fact("where", `${one.suite}, ${one.set}, ${one.id}`);
  const seen = element("figure", {}, image(one.picture, "large"), element("figcaption", {textContent: one.picture.name}));
  if (one.picture.src) seen.firstChild.alt = `Picture ${one.picture.name}`;
  const sight = element("div", {className: "sight"}, seen);
  byId("detail").replaceChildren(sight, facts);
  if (one.picture.routing) drawRouting(one.picture, sight);
}

// --- routing maps ---

const colour = (expert) => PALETTE[expert % 8].map((part) => Math.round(part * 0.6 ** Math.floor(expert / 8)));
const css = (expert) => `rgb(${colour(expert).join(", ")})`;

function drawRouting(picture, sight) {
  const maps = picture.routing;
  const layers = [...new Set(maps.flatMap((map) => map ? Object.keys(map.layers) : []))].sort((a, b) => a - b);
  if (!layers.includes(layer)) layer = layers[layers.length - 1];
  const select = element("select", {id: "layer"});
  offer(select, layers.map((one) => [one, one]));
  select.value = layer;
  const box = element("input", {type: "checkbox", id: "alone", checked: alone});
  const canvases = maps.map((map, number) => {
    if (!map) return null;
    const canvas = element("canvas", {className: "map"});
    const whose = two ? `${"AB"[number]}: ` : "";
    sight.append(element("figure", {}, canvas, element("figcaption", {textContent: `${whose}first expert of each patch`})));
    canvas.setAttribute("role", "img");
    return canvas;
  });
  const legend = element("ul", {className: "legend"});
  const redraw = () => {
    layer = select.value;
    alone = box.checked;
    const lines = [];
    maps.forEach((map, number) => {
      if (!map?.layers[layer]) return;
      const experts = [...map.layers[layer]].map((digit) => parseInt(digit, 36));
      drawMap(canvases[number], map, experts, picture, data.fit[number]);
      const shares = Array.from({length: map.experts}, (_, expert) =>
        Math.round(100 * experts.filter((one) => one === expert).length / experts.length));
      canvases[number].setAttribute("aria-label", `Block ${layer}: ` +
        shares.map((share, expert) => `expert ${expert} ${share}% of the patches`).join(", "));
      lines.push(shares);
    });
    legend.replaceChildren(...Array.from({length: Math.max(...lines.map((one) => one.length))}, (_, expert) => {
      const swatch = element("span", {className: "swatch"});
      swatch.style.background = css(expert);
      return element("li", {}, swatch, `expert ${expert}: ${lines.map((one) => `${one[expert] ?? 0}%`).join(" / ")}`);
    }));
  };
  select.addEventListener("change", redraw);
  box.addEventListener("change", redraw);
  byId("detail").append(element("fieldset", {id: "routing"}, element("legend", {textContent: "Where the tower's patches go"}),
    element("label", {htmlFor: "layer", textContent: "block"}), select,
    box, element("label", {htmlFor: "alone", textContent: " map without the picture"}), legend));
  redraw();
}

function drawMap(canvas, map, experts, picture, fit) {
  const [rows, columns] = map.grid, side = Math.max(2, Math.floor(540 / Math.max(rows, columns)));
  canvas.width = columns * side;
  canvas.height = rows * side;
  const pen = canvas.getContext("2d");
  const patches = (opacity) => {
    pen.globalAlpha = opacity;
    experts.forEach((expert, index) => {
      pen.fillStyle = css(expert);
      pen.fillRect((index % columns) * side, Math.floor(index / columns) * side, side, side);
    });
    pen.globalAlpha = 1;
  };
  patches(1);
  if (alone || !fit || !picture.src) return;
  const seen = new Image();
  seen.onload = () => {
    if (alone) return;  // the box was ticked meanwhile
    const {width, height} = canvas;
    let across = width, down = height;
    if (fit.how !== "stretch") {
      const ratio = [width / seen.naturalWidth, height / seen.naturalHeight];
      const scale = fit.how === "pad" ? Math.min(...ratio) : Math.max(...ratio) * fit.zoom;
      [across, down] = [seen.naturalWidth * scale, seen.naturalHeight * scale];
    }
    pen.fillStyle = "#808080";
    pen.fillRect(0, 0, width, height);
    pen.drawImage(seen, (width - across) / 2, (height - down) / 2, across, down);
    patches(0.5);
  };
  seen.src = picture.src;
}

// --- controls; their state is in the address, so that a link leads back ---

let later;

function remember() {
  clearTimeout(later);
  later = setTimeout(store, 150);  // browsers refuse many changes a second, as a held key makes
}

function store() {
  const state = new URLSearchParams();
  for (const id of ["show", "suite", "set", "text"]) {
    const value = byId(id).value;
    if (value && value !== "all") state.set(id, value);
  }
  if (found[chosen] && (chosen || location.hash)) state.set("id", found[chosen].key);
  if (String(state) || location.hash) history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  const pick = (id, fallback) => {
    const value = state.get(id) ?? fallback;
    byId(id).value = [...byId(id).options].some((option) => option.value === value) ? value : fallback;
  };
  pick("show", "all");
  pick("suite", "");
  offerSets();
  pick("set", "");
  byId("text").value = state.get("text") ?? "";
  filter(state.get("id"));
}

offer(byId("show"), Object.entries(SHOW).filter(([name, [, test]]) => !OFTEN_NONE.includes(name) || questions.some(test))
  .map(([name, [words]]) => [name, words]));
offer(byId("suite"), [["", "all"], ...[...new Set(questions.map((one) => one.suite))].map((suite) => [suite, suite])]);
byId("left-out").textContent = data.note;
byId("left-out").hidden = !data.note;
for (const id of ["show", "set"]) byId(id).addEventListener("change", () => filter());
byId("suite").addEventListener("change", () => { offerSets(); filter(); });
byId("text").addEventListener("input", () => filter());
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => choose((Math.floor(chosen / PER_PAGE) - 1) * PER_PAGE));
byId("next").addEventListener("click", () => choose((Math.floor(chosen / PER_PAGE) + 1) * PER_PAGE));
for (const button of document.querySelectorAll(".find")) {
  button.addEventListener("click", () => {
    for (const id of ["set", "suite"]) byId(id).value = "";
    byId("show").value = "all";
    offerSets();
    byId("text").value = button.dataset.search;
    filter();
    byId("questions").scrollIntoView();
    byId("list").focus({preventScroll: true});
  });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  const inList = event.target === byId("list");
  const moves = {j: 1, k: -1, ...(inList ? {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10} : {})};
  const ends = inList ? {Home: 0, End: found.length - 1} : {};
  if (event.key in moves) choose(chosen + moves[event.key]);
  else if (event.key in ends) choose(ends[event.key]);
  else return;
  event.preventDefault();
});
addEventListener("hashchange", recall);
recall();
