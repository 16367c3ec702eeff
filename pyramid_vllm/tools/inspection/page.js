"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const numTokens = data.num_computed;
const numLayers = data.layers.length;
const numHeads = data.num_kv_heads;
const HEADER = 20;

// heads[layer * numTokens + position]: KV heads of the layer that keep the token.
const heads = new Uint16Array(numLayers * numTokens);
for (const { layer, positions, heads: counts } of data.layers) {
  positions.forEach((position, i) => (heads[layer * numTokens + position] = counts[i]));
}

const state = { tier: null, position: 0, layer: 0 };
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const oneDigit = { minimumFractionDigits: 1, maximumFractionDigits: 1 };
const decimal = (value) => value.toLocaleString("en", oneDigit);
const percent = (value) => `${(100 * value).toFixed(1)}%`;

/** An element with text; what it is given is never read as HTML. */
function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function bytes(size) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (size < 1024) return unit === "B" ? `${size} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} GiB`;
}

/** Ascending numbers as runs: 0-3, 7. */
function runs(numbers) {
  const parts = [];
  for (const value of numbers) {
    const last = parts[parts.length - 1];
    if (last && last[1] === value - 1) last[1] = value;
    else parts.push([value, value]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(", ");
}

function keptBy(layer, position) {
  return position < numTokens ? heads[layer * numTokens + position] : 0;
}

/** The layers that count: all, or those of the chosen tier. */
function shownLayers() {
  return state.tier === null
    ? data.layers.map((layer) => layer.layer)
    : data.tiers[state.tier].layers;
}

// Summary and tiers.

function fillSummary() {
  const numGenerated = data.tokens.length - data.num_prompt;
  byId("summary").textContent =
    `Policy ${data.policy.name} on ${data.model}: one prompt, after ${number(numGenerated)} ` +
    "generated tokens. The last one has no key and no value yet.";
  const kvBytes = data.tiers.reduce((sum, tier) => sum + tier.kv_bytes, 0);
  const figures = {
    "Prompt tokens": number(data.num_prompt),
    "Generated tokens": number(numGenerated),
    "Layers with full attention": number(numLayers),
    "KV heads a layer": number(numHeads),
    "KV bytes": bytes(kvBytes),
    "Of stock vLLM's": percent(kvBytes / data.stock_kv_bytes),
  };
  for (const [name, value] of Object.entries(figures)) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    byId("figures").append(pair);
  }
}

function fillTiers() {
  const body = byId("tiers").tBodies[0];
  for (const tier of data.tiers) {
    const row = element("tr", "", { "data-tier": tier.tier });
    const name = element("th", "", { scope: "row" });
    const button = element("button", `Tier ${tier.tier}`, {
      type: "button",
      "aria-pressed": "false",
    });
    button.addEventListener("click", () => chooseTier(tier.tier));
    name.append(button);
    const share = tier.num_prompt_held / data.num_prompt;
    const cell = element("td", "", { class: "number" });
    const bar = element("span", "", { class: "bar", "aria-hidden": "true" });
    const fill = element("i");
    fill.style.width = percent(share);
    bar.append(fill);
    cell.append(bar, element("span", percent(share), { class: "percent" }));
    row.append(
      name,
      element("td", runs(tier.layers)),
      element("td", number(tier.num_prompt_held), { class: "number" }),
      cell,
      element("td", number(tier.num_held), { class: "number" }),
      element("td", number(tier.pages), { class: "number" }),
      element("td", bytes(tier.kv_bytes), { class: "number" }),
    );
    body.append(row);
  }
  fillTotal();
}

function fillTotal() {
  const mean = (field) =>
    data.tiers.reduce((sum, tier) => sum + tier[field] * tier.layers.length, 0) / numLayers;
  const kvBytes = data.tiers.reduce((sum, tier) => sum + tier.kv_bytes, 0);
  const row = element("tr");
  row.append(element("th", "Mean, sum of bytes", { scope: "row", colspan: 2 }));
  for (const text of [
    decimal(mean("num_prompt_held")),
    percent(mean("num_prompt_held") / data.num_prompt),
    decimal(mean("num_held")),
    decimal(mean("pages")),
    bytes(kvBytes),
  ]) {
    row.append(element("td", text, { class: "number" }));
  }
  byId("tiers").tFoot.append(row);
}

function chooseTier(tier) {
  state.tier = state.tier === tier ? null : tier;
  for (const row of byId("tiers").tBodies[0].rows) {
    const chosen = row.dataset.tier === String(state.tier);
    row.classList.toggle("chosen", chosen);
    row.querySelector("button").setAttribute("aria-pressed", String(chosen));
  }
  for (const label of byId("rows").querySelectorAll("b")) {
    label.classList.toggle("chosen", label.dataset.tier === String(state.tier));
  }
  draw();
  shadeText();
  tell();
}

// The grid.

const canvas = document.querySelector("canvas");
const size = { width: 1, height: 12 };

function measure() {
  // Browsers have a largest canvas.
  const most = 16000 / (window.devicePixelRatio || 1) / numTokens;
  const room = byId("scroll").clientWidth / numTokens;
  size.width = Math.min(most, Math.max(2, Math.min(14, room)));
  size.height = numLayers > 40 ? 9 : 13;
}

/** Left edge of a column: whole pixels, so that edges stay sharp. */
const edge = (position) => Math.round(position * size.width);

function colors() {
  const style = getComputedStyle(document.documentElement);
  const channels = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  return { empty: channels("--empty"), kept: channels("--kept"), line: channels("--line") };
}

const mixed = (a, b, share) =>
  `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(" ")})`;

/** Colours by number of heads: none is far from one. */
function palette(dimmed) {
  const { empty, kept } = colors();
  return Array.from({ length: numHeads + 1 }, (_, count) => {
    const share = count === 0 ? 0 : 0.25 + (0.75 * count) / numHeads;
    return mixed(empty, kept, dimmed ? 0.3 * share : share);
  });
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const width = edge(numTokens);
  const height = numLayers * size.height;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const plain = palette(false);
  const dimmed = palette(true);
  const gap = size.width > 5 ? 1 : 0;
  for (const { layer, tier } of data.layers) {
    const shades = state.tier === null || state.tier === tier ? plain : dimmed;
    const top = layer * size.height;
    pen.fillStyle = shades[0];
    pen.fillRect(0, top, width, size.height - 1);
    for (let start = 0; start < numTokens; ) {
      const count = heads[layer * numTokens + start];
      let end = start + 1;
      while (!gap && end < numTokens && heads[layer * numTokens + end] === count) end += 1;
      if (count > 0) {
        pen.fillStyle = shades[count];
        pen.fillRect(edge(start), top, edge(end) - edge(start) - gap, size.height - 1);
      }
      start = end;
    }
  }
  drawLines(pen, width, height);
}

function drawLines(pen, width, height) {
  const style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--mark");
  for (const [position] of marks()) {
    pen.fillRect(edge(position) - 1, 0, 1, height);
  }
  pen.fillStyle = style.getPropertyValue("--faint");
  data.layers.forEach(({ layer, tier }) => {
    if (layer && data.layers[layer - 1].tier !== tier) {
      pen.fillRect(0, layer * size.height - 1, width, 1);
    }
  });
}

/** Where a part of the sequence begins, and its name. */
function marks() {
  const found = [];
  if (data.sinks > 0) found.push([0, "sinks"]);
  const recent = data.num_prompt - data.recent;
  if (data.sinks < recent) found.push([data.sinks, "prompt"]);
  if (data.recent > 0) found.push([recent, "recent window"]);
  if (data.num_prompt < numTokens) found.push([data.num_prompt, "generated"]);
  return found;
}

function fillFrame() {
  let free = 0;
  byId("marks").textContent = "";
  for (const [position, name] of marks()) {
    const left = edge(position);
    const label = element("span", left < free ? "" : name);
    if (left >= free) {
      free = left + 7 * name.length;
      label.classList.toggle("before", free > edge(numTokens));
    }
    if (label.className) label.style.right = `${edge(numTokens) - left}px`;
    else label.style.left = `${left}px`;
    byId("marks").append(label);
  }
  byId("rows").textContent = "";
  for (let layer = 0; layer < numLayers; layer += size.height < 11 ? 4 : 2) {
    const label = element("span", `${layer}`);
    label.style.top = `${HEADER + layer * size.height - 3}px`;
    byId("rows").append(label);
  }
  let first = 0;
  for (let layer = 1; layer <= numLayers; layer += 1) {
    const tier = data.layers[first].tier;
    if (layer < numLayers && data.layers[layer].tier === tier) continue;
    const label = element("b", `tier ${tier}`, { "data-tier": tier });
    label.style.top = `${HEADER + first * size.height}px`;
    label.style.height = `${(layer - first) * size.height - 1}px`;
    label.style.lineHeight = `${size.height}px`;
    label.classList.toggle("chosen", state.tier === tier);
    byId("rows").append(label);
    first = layer;
  }
}

function fillLegend() {
  byId("legend").textContent = "";
  palette(false).forEach((color, count) => {
    const words = count === 0 ? "kept by no KV head" : `by ${count} of ${numHeads}`;
    if (numHeads > 8 && count !== 0 && count !== 1 && count !== numHeads) return;
    const item = element("span");
    const box = element("i");
    box.style.background = color;
    item.append(box, words);
    byId("legend").append(item);
  });
}

function showCursor() {
  const cursor = byId("cursor");
  cursor.hidden = state.position >= numTokens;
  cursor.style.left = `${edge(state.position) - 2}px`;
  cursor.style.top = `${HEADER + state.layer * size.height - 2}px`;
  cursor.style.width = `${size.width + 4}px`;
  cursor.style.height = `${size.height + 3}px`;
}

/** Scroll a part's own frame, and nothing of the page. */
function reveal(frame, start, end, sideways) {
  const [place, room] = sideways ? ["scrollLeft", "clientWidth"] : ["scrollTop", "clientHeight"];
  if (start < frame[place]) frame[place] = start - 40;
  else if (end > frame[place] + frame[room]) frame[place] = end - frame[room] + 40;
}

function moveTo(position, layer) {
  const last = data.tokens.length - 1;
  spans[state.position].classList.remove("here");
  state.position = Math.max(0, Math.min(last, position));
  state.layer = Math.max(0, Math.min(numLayers - 1, layer));
  spans[state.position].classList.add("here");
  showCursor();
  tell();
}

function follow() {
  reveal(byId("scroll"), edge(state.position), edge(state.position + 1), true);
  const span = spans[state.position];
  const top = span.offsetTop - byId("text").offsetTop;
  reveal(byId("text"), top, top + span.offsetHeight, false);
}

function part(position) {
  if (position >= numTokens) return "generated last, not in the cache yet";
  if (position >= data.num_prompt) return "generated";
  if (position < data.sinks) return "sink, always kept";
  if (position >= data.num_prompt - data.recent) return "recent window, always kept";
  return "prompt";
}

/** Layers by how many of their heads keep the token: "layers 0-5: 3 of 3 heads". */
function whoKeeps(position) {
  const byCount = new Map();
  for (let layer = 0; layer < numLayers; layer += 1) {
    const count = keptBy(layer, position);
    if (count) byCount.set(count, [...(byCount.get(count) || []), layer]);
  }
  const parts = [...byCount.entries()].sort((a, b) => b[0] - a[0]);
  return parts
    .map(([count, layers]) => `${count} of ${numHeads} heads in layers ${runs(layers)}`)
    .join("; ");
}

function tell() {
  const { position, layer } = state;
  const token = data.tokens[position];
  const kept = data.layers.filter((view) => keptBy(view.layer, position)).length;
  const first = element("p");
  first.append(
    `Position ${position}: `,
    element("code", visible(token.text)),
    ` (id ${token.id}, ${part(position)})`,
  );
  const here = keptBy(layer, position);
  const second = element(
    "p",
    `Layer ${layer}, tier ${data.layers[layer].tier}: kept by ${here} of ${numHeads} KV heads.`,
  );
  const third = element("p", `Kept in ${kept} of ${numLayers} layers`);
  third.append(kept ? `: ${whoKeeps(position)}.` : ".");
  byId("cell").replaceChildren(first, second, third);
}

const visible = (text) =>
  text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ | $/g, "\u2423") || "(nothing)";

function cellAt(event) {
  const box = canvas.getBoundingClientRect();
  return [
    Math.floor((event.clientX - box.left) / size.width),
    Math.floor((event.clientY - box.top) / size.height),
  ];
}

function listen() {
  const grid = byId("grid");
  const go = (event) => moveTo(...cellAt(event).map((at) => Math.max(0, at)));
  grid.addEventListener("pointermove", go);
  grid.addEventListener("click", go);
  grid.addEventListener("keydown", (event) => {
    const { position, layer } = state;
    const steps = {
      ArrowLeft: [position - 1, layer],
      ArrowRight: [position + 1, layer],
      ArrowUp: [position, layer - 1],
      ArrowDown: [position, layer + 1],
      PageUp: [position - 20, layer],
      PageDown: [position + 20, layer],
      Home: [0, layer],
      End: [numTokens - 1, layer],
    };
    const target = steps[event.key];
    if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moveTo(Math.min(numTokens - 1, target[0]), target[1]);
    follow();
  });
  byId("text").addEventListener("click", (event) => {
    const position = spans.indexOf(event.target);
    if (position < 0) return;
    moveTo(position, state.layer);
    follow();
  });
}

// The text.

const spans = data.tokens.map((token, position) => {
  const span = element("span", token.text, { "data-position": position });
  if (position >= data.num_prompt) span.className = "generated";
  return span;
});

function shadeText() {
  const layers = shownLayers();
  const { kept } = colors();
  spans.forEach((span, position) => {
    let sum = 0;
    let count = 0;
    for (const layer of layers) {
      const here = keptBy(layer, position);
      sum += here;
      count += here > 0;
    }
    const share = sum / (layers.length * numHeads);
    span.style.background = `rgb(${kept.join(" ")} / ${(0.5 * share).toFixed(3)})`;
    span.classList.toggle("gone", sum === 0);
    span.title = `position ${position}: kept in ${count} of ${layers.length} layers`;
  });
  byId("text-help").textContent =
    (state.tier === null
      ? "The stronger the colour, the more of all layers' KV heads keep a token. "
      : `The stronger the colour, the more KV heads of tier ${state.tier} keep a token. `) +
    "Grey letters: none does. Underlined: generated. Click a token to find it in the grid.";
}

function fillSettings() {
  const rows = { ...data.policy, ...data.versions, command: data.argv, date: data.date };
  for (const [name, value] of Object.entries(rows)) {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    byId("settings").append(element("dt", name), element("dd", text));
  }
}

function layOut() {
  measure();
  fillFrame();
  fillLegend();
  draw();
  showCursor();
  shadeText();
}

fillSummary();
fillTiers();
fillSettings();
byId("text").append(...spans);
layOut();
moveTo(0, 0);
listen();
window.addEventListener("resize", layOut);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", layOut);
