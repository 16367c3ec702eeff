"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const numTokens = data.num_computed;
const spans = [...byId("text").children];
const buttons = [...document.querySelectorAll("#tiers button")];
const canvas = document.querySelector("canvas");
const state = { tier: null, position: 0, layer: 0 };
const HEIGHT = 12;
let width = 2;

// kept[layer][position]: KV heads of the layer that keep the token.
const kept = data.layers.map(({ positions, heads }) => {
  const row = new Uint16Array(data.tokens.length);
  positions.forEach((position, i) => (row[position] = heads[i]));
  return row;
});
const isShown = (layer) => state.tier === null || data.layers[layer].tier === state.tier;

function drawGrid() {
  // Browsers have a largest canvas.
  const room = byId("scroll").clientWidth / numTokens;
  width = Math.min(16000 / numTokens, Math.max(2, Math.min(14, room)));
  canvas.width = numTokens * width;
  canvas.height = kept.length * HEIGHT;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  pen.fillStyle = style.color;
  kept.forEach((row, layer) => {
    for (let position = 0; position < numTokens; position += 1) {
      const share = row[position] / data.num_kv_heads;
      // No head is far from one head.
      pen.globalAlpha = share ? (0.25 + 0.75 * share) * (isShown(layer) ? 1 : 0.3) : 0.06;
      pen.fillRect(position * width, layer * HEIGHT, width - (width > 5), HEIGHT - 1);
    }
  });
  pen.globalAlpha = 1;
  pen.fillStyle = style.borderTopColor;
  for (const position of [data.sinks, data.num_prompt - data.recent, data.num_prompt]) {
    pen.fillRect(position * width - 1, 0, 1, canvas.height);
  }
}

function shadeText() {
  const rows = kept.filter((_, layer) => isShown(layer));
  spans.forEach((span, position) => {
    const sum = rows.reduce((total, row) => total + row[position], 0);
    const share = (50 * sum) / (rows.length * data.num_kv_heads);
    span.style.backgroundColor = `color-mix(in srgb, var(--kept) ${share}%, transparent)`;
    span.classList.toggle("gone", sum === 0);
  });
}

function moveTo(position, layer) {
  spans[state.position].classList.remove("here");
  state.position = Math.max(0, Math.min(spans.length - 1, position));
  state.layer = Math.max(0, Math.min(kept.length - 1, layer));
  const here = spans[state.position];
  here.classList.add("here");
  const cursor = byId("cursor").style;
  cursor.left = `${state.position * width - 2}px`;
  cursor.top = `${state.layer * HEIGHT - 2}px`;
  cursor.width = `${width + 4}px`;
  cursor.display = state.position < numTokens ? "" : "none";
  const heads = `${kept[state.layer][state.position]} of ${data.num_kv_heads} KV heads`;
  byId("cell").textContent =
    `Token: ${here.textContent}\n${here.title}\n` +
    `Layer ${state.layer}, tier ${data.layers[state.layer].tier}: kept by ${heads}.`;
}

/** Scroll the grid and the text to the cursor, and nothing else of the page. */
function follow() {
  const scroll = byId("scroll");
  const text = byId("text");
  scroll.scrollLeft = state.position * width - scroll.clientWidth / 2;
  text.scrollTop = spans[state.position].offsetTop - text.offsetTop - text.clientHeight / 2;
}

function point(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  moveTo(Math.floor(x / width), Math.floor(y / HEIGHT));
}

function press(event) {
  const { position, layer } = state;
  const target = {
    ArrowLeft: [position - 1, layer],
    ArrowRight: [position + 1, layer],
    ArrowUp: [position, layer - 1],
    ArrowDown: [position, layer + 1],
    PageUp: [position - 20, layer],
    PageDown: [position + 20, layer],
    Home: [0, layer],
    End: [numTokens - 1, layer],
  }[event.key];
  if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moveTo(Math.min(numTokens - 1, target[0]), target[1]);
  follow();
}

function chooseTier(tier) {
  state.tier = state.tier === tier ? null : tier;
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === state.tier));
  drawGrid();
  shadeText();
}

function layOut() {
  drawGrid();
  moveTo(state.position, state.layer);
}

buttons.forEach((button, tier) => button.addEventListener("click", () => chooseTier(tier)));
byId("grid").addEventListener("pointermove", point);
byId("grid").addEventListener("click", point);
byId("grid").addEventListener("keydown", press);
byId("text").addEventListener("click", (event) => {
  if (!spans.includes(event.target)) return;
  moveTo(spans.indexOf(event.target), state.layer);
  follow();
});
window.addEventListener("resize", layOut);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawGrid);
layOut();
shadeText();
