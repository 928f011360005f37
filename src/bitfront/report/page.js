// Draws the pictures of the page from the JSON in it. One function per picture; every colour comes from the style.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const places = new Map(data.number.map((number, place) => [number, place]));
const narrow = () => window.innerWidth < 600;
let chosen = null;

// Text for a picture: plotly reads some HTML in it, so what is the user's is escaped.
const text = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

function element(tag, content, attributes = {}) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (typeof content === "string") node.textContent = content;
  else node.append(...(content || []));
  return node;
}

function layout(more) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: colour("paper"), plot_bgcolor: colour("paper"),
    font: { color: colour("ink"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
    margin: { l: 50, r: 15, t: 10, b: 45 }, hovermode: "closest", dragmode: narrow() ? false : "zoom",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
// Without a pointer that hovers, the tools would always be there, and cover what is drawn.
const tools = window.matchMedia("(hover: hover)").matches ? "hover" : false;
const settings = {
  responsive: true, displaylogo: false, displayModeBar: tools, modeBarButtonsToRemove: ["lasso2d", "select2d"],
  showSendToCloud: false, plotlyServerURL: "", // nothing leaves the page
};

function draw(target, traces, more, changed = {}) {
  return Plotly.react(target, traces, layout(more), { ...settings, ...changed });
}

// A box for one picture inside `parent`, created once.
function box(parent, name, height) {
  let target = byId(name);
  if (!target) {
    target = element("div", [], { id: name, class: "plot", role: "img" });
    byId(parent).append(target);
  }
  target.style.height = `${height}px`;
  return target;
}

function spelled(place) {
  const { nodes, keys, roots } = data.config;
  const value = (i) => {
    const node = nodes[i];
    return node.length === 1 ? node[0] : Object.fromEntries(keys[node[0]].map((key, j) => [key, value(node[1][j])]));
  };
  return value(roots[place]);
}

function choices(place) {
  return data.parameters
    .map((parameter, i) => [parameter.name, parameter.labels[data.choices[i][place]]])
    .filter(([, label]) => label !== undefined);
}

function hover(place) {
  const shown = [...new Set([data.quality, ...data.costs])].map((m) => `${text(data.metrics[m])}: ${number(data.values[m][place])}`);
  const labels = choices(place).map(([name, label]) => `${text(name)} ${text(label)}`);
  const more = labels.length > 12 ? [`… and ${labels.length - 12} more`] : [];
  return [`<b>trial ${data.number[place]}</b>`, ...shown, ...labels.slice(0, 12), ...more].join("<br>") + "<extra></extra>";
}

// ---- labels

const canvas = document.createElement("canvas").getContext("2d");

// How wide a text is in a picture, in pixels.
function wide(label, size) {
  canvas.font = `${size}px system-ui, sans-serif`;
  return canvas.measureText(label).width;
}

// A linear axis of bits has steps that are powers of two; others have what plotly takes.
function linear(unit, values) {
  const known = values.filter((v) => typeof v === "number");
  const range = Math.max(...known) - Math.min(...known);
  return unit === "bits" && range > 0 ? { tick0: 0, dtick: 2 ** Math.ceil(Math.log2(range / 7)) } : {};
}

// The labels above points on a line, each with its middle: [[middle, text]]. Points without room for two share one.
function spaced(points, pixels, [low, high]) {
  const joined = (labels) => (labels.length <= 4 ? labels.join(" ") : `${labels[0]} … ${labels.at(-1)}`);
  const half = (group) => (wide(joined(group.labels), 11) + 6) / 2 / pixels;
  const middle = (group) => Math.min(Math.max((group.from + group.to) / 2, low + half(group)), high - half(group));
  const groups = [];
  for (const { mean, short } of points) {
    groups.push({ from: mean, to: mean, labels: [short] });
    while (groups.length > 1 && middle(groups.at(-1)) - half(groups.at(-1)) < middle(groups.at(-2)) + half(groups.at(-2))) {
      const last = groups.pop(), before = groups.pop();
      groups.push({ from: before.from, to: last.to, labels: [...before.labels, ...last.labels] });
    }
  }
  return groups.map((group) => [middle(group), joined(group.labels)]);
}

// ---- the front

// On a logarithmic axis as wide as `room`: 1, 2 and 5 times powers of ten that `values` span, or fewer; of bits, the powers of two.
function ticks(values, unit, room) {
  const known = values.filter((v) => typeof v === "number" && v > 0);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  if (unit === "bits" && high <= 1024 && low >= 0.1) return [...Array(14).keys()].map((i) => 2 ** (i - 3)).filter((v) => v >= low * 0.8 && v <= high * 1.2);
  let inside = [];
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const round = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      round.push(...digits.map((digit) => Number(`${digit}e${power}`)));
    }
    inside = round.filter((v) => v >= low * 0.7 && v <= high * 1.4);
    const widest = Math.max(0, ...inside.map((v) => wide(number(v), 13) + 14));
    if (widest * inside.length < room) break;
  }
  return inside;
}

function front() {
  const x = byId("front-x").value, y = byId("front-y").value;
  const onFront = new Set(data.front);
  const others = data.drawn.filter((place) => !onFront.has(place));
  const sorted = data.front.map((place, i) => [place, i]).sort((a, b) => data.values[x][a[0]] - data.values[x][b[0]]);
  const points = sorted.map(([place]) => place);
  const trace = (shown, more) => ({
    type: "scatter", mode: "markers", x: shown.map((p) => data.values[x][p]), y: shown.map((p) => data.values[y][p]),
    customdata: shown.map((p) => data.number[p]), hovertemplate: shown.map(hover), ...more,
  });
  const traces = [trace(others, { name: "trials", marker: { color: colour("cloud"), size: 6, opacity: 0.6 } })];
  const frontTrace = trace(points, {
    name: "front", mode: y === data.quality && data.costs.includes(x) ? "lines+markers" : "markers",
    line: { color: colour("front"), width: 1, shape: data.better[x] === "maximize" ? "vh" : "hv" },
    marker: { color: colour("front"), size: 10, symbol: "diamond" },
  });
  if (y === data.quality && data.low.some((v) => v !== null)) {
    frontTrace.error_y = {
      type: "data", symmetric: false, color: colour("front"), thickness: 1, width: 3,
      array: sorted.map(([p, i]) => (data.high[i] === null ? 0 : data.high[i] - data.values[y][p])),
      arrayminus: sorted.map(([p, i]) => (data.low[i] === null ? 0 : data.values[y][p] - data.low[i])),
    };
  }
  traces.push(frontTrace);
  const reference = [data.reference[x], data.reference[y]];
  if (reference.every((v) => v !== null && v !== undefined)) {
    traces.push({
      type: "scatter", mode: "markers", name: "float model", x: [reference[0]], y: [reference[1]],
      marker: { color: colour("float"), size: 14, symbol: "star" },
      hovertemplate: `<b>float model</b><br>${text(data.metrics[x])}: ${number(reference[0])}<br>${text(data.metrics[y])}: ${number(reference[1])}<extra></extra>`,
    });
  }
  if (chosen !== null) {
    traces.push({ ...trace([chosen], { name: "chosen", hoverinfo: "skip", marker: { size: 18, symbol: "circle-open", color: colour("ink"), line: { width: 2, color: colour("ink") } } }), hovertemplate: null, showlegend: false });
  }
  const type = byId("front-log").checked ? "log" : "linear";
  const [across, up] = ["x", "y"].map((axis) => traces.flatMap((t) => t[axis]));
  const tickvals = ticks(across, data.units[x], byId("front-plot").clientWidth - 70);
  const numbers = type === "log" ? { tickvals, ticktext: tickvals.map(number) } : linear(data.units[x], across);
  // Bounds of constraints among the points; others would squeeze the points together.
  const inside = (values, bound) => values.some((v) => v !== null && v <= bound) && values.some((v) => v !== null && v >= bound);
  const line = { color: colour("ink"), width: 1, dash: "dash" };
  const shapes = data.bounds.flatMap(([metric, bound]) => [
    ...(metric === x && inside(across, bound) ? [{ type: "line", x0: bound, x1: bound, y0: 0, y1: 1, yref: "paper", line }] : []),
    ...(metric === y && inside(up, bound) ? [{ type: "line", x0: 0, x1: 1, xref: "paper", y0: bound, y1: bound, line }] : []),
  ]);
  if (shapes.length) traces.push({ type: "scatter", mode: "lines", name: "constraints", x: [null], y: [null], line });
  return draw("front-plot", traces, {
    shapes,
    xaxis: { title: { text: text(data.metrics[x]) }, type, ...numbers },
    yaxis: { title: { text: text(data.metrics[y]) }, ...linear(data.units[y], up) },
  });
}

function choose(trial, focus) {
  chosen = places.get(trial);
  const here = chosen;
  for (const button of document.querySelectorAll("button.trial")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.trial) === trial));
  }
  const row = (cells) => element("tr", [element("th", cells[0], { scope: "row" }), element("td", cells[1])]);
  const table = (caption, rows) => element("div", [
    element("table", [element("caption", caption), element("tbody", rows.map(row))]),
  ], { class: "scroll" });
  const metrics = Object.entries(data.metrics).map(([m, title]) => [title, number(data.values[m][here])]);
  const inFront = data.front.indexOf(here);
  if (inFront >= 0 && data.test[inFront] !== null) metrics.push([`test ${data.tested}`, number(data.test[inFront])]);
  const command = data.command + trial;
  const copy = element("button", "Copy the command", { type: "button" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command);
    copy.textContent = "Copied";
  });
  byId("details").replaceChildren(
    element("h3", `Trial ${trial}${inFront >= 0 ? ", on the front" : ""}`),
    element("p", "Rebuilt by"), element("pre", command, { class: "command", tabindex: "0" }), copy,
    table("What it is worth", metrics), table("What it chose", choices(here)),
    element("details", [element("summary", "The configuration"), element("pre", JSON.stringify(spelled(here), null, 2), { class: "spelled", tabindex: "0" })], { open: "" }),
  );
  if (focus) {
    byId("details").focus({ preventScroll: true });
    byId("details").scrollIntoView({ block: "nearest" });
  }
  front();
}

function fillFront() {
  byId("front-note").textContent = `${data.note}. Hover shows a trial, a click what it is and how to rebuild it.`;
  const first = data.costs.filter((m) => m in data.metrics);
  const names = Object.keys(data.metrics);
  const option = (m) => element("option", data.metrics[m], { value: m });
  byId("front-x").append(...[...first, ...names.filter((m) => !first.includes(m))].map(option));
  byId("front-y").append(...[data.quality, ...names.filter((m) => m !== data.quality)].filter((m) => m in data.metrics).map(option));
  const spread = () => {
    const all = [...data.drawn.map((p) => data.values[byId("front-x").value]?.[p]), data.reference[byId("front-x").value]].filter((v) => typeof v === "number");
    byId("front-log").checked = all.length > 0 && Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) > 8;
  };
  spread();
  byId("front-x").addEventListener("change", () => { spread(); front(); });
  byId("front-y").addEventListener("change", front);
  byId("front-log").addEventListener("change", front);
  byId("front-list").append(...data.front.map((place) => {
    const about = `trial ${data.number[place]}: ${data.quality} ${number(data.values[data.quality]?.[place])}`;
    return element("button", String(data.number[place]), { type: "button", class: "trial", "data-trial": data.number[place], title: about, "aria-label": about });
  }));
  for (const button of document.querySelectorAll("button.trial")) {
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => places.has(Number(button.dataset.trial)) && choose(Number(button.dataset.trial), true));
  }
}

// ---- what mattered

function importance(one, i) {
  if (one.missing) return;
  const parameters = [...one.parameters].reverse();
  const names = ["interactions and noise", ...parameters.map((p) => p.name)];
  const shares = [one.rest, ...parameters.map((p) => p.share)];
  // A label stands beside its bar: an axis that ends at 100 % would cut it off.
  const end = narrow() ? 1.45 : 1.12;
  draw(box("importance", `importance-${i}`, 120 + 26 * names.length), [{
    type: "bar", orientation: "h", x: shares, y: names.map(text), text: shares.map((s) => `${(100 * s).toFixed(1)} %`),
    textposition: "outside", cliponaxis: false, marker: { color: names.map((_, j) => colour(j ? "front" : "cloud")) },
    hovertemplate: "%{y}: %{text}<extra></extra>",
  }], { xaxis: { title: { text: `share of the variance of<br>${text(one.metric)}` }, range: [0, end], tickformat: ".0%", tickvals: narrow() ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1] }, yaxis: { ticksuffix: " " } }, { displayModeBar: false });
}

function effects(one, i) {
  if (one.missing) return;
  const parameters = [...one.parameters].reverse();
  const lines = { x: [], y: [] }, dots = { x: [], y: [], about: [] }, labels = { x: [], y: [], text: [] };
  const every = parameters.flatMap((parameter) => parameter.effects.map((e) => e.mean));
  const target = box("effects", `effects-${i}`, 120 + 44 * parameters.length);
  const names = Math.max(...parameters.map((parameter) => wide(parameter.name, narrow() ? 11 : 13)));
  const [low, high] = [Math.min(...every), Math.max(...every)];
  const range = [low - 0.05 * (high - low), high + 0.05 * (high - low)];
  const pixels = (target.clientWidth - names - 40) / (range[1] - range[0]);
  parameters.forEach((parameter) => {
    const means = parameter.effects.map((e) => e.mean);
    lines.x.push(Math.min(...means), Math.max(...means), null);
    lines.y.push(text(parameter.name), text(parameter.name), null);
    const sorted = [...parameter.effects].sort((a, b) => a.mean - b.mean);
    for (const [middle, label] of spaced(sorted, pixels, range)) {
      labels.x.push(middle);
      labels.y.push(text(parameter.name));
      labels.text.push(text(label));
    }
    sorted.forEach((e) => {
      dots.x.push(e.mean);
      dots.y.push(text(parameter.name));
      dots.about.push(`${text(parameter.name)} ${text(e.label)}<br>mean ${number(e.mean)} (${e.effect >= 0 ? "+" : ""}${number(e.effect)})<br>${e.trials.toLocaleString("en")} trials<extra></extra>`);
    });
  });
  draw(target, [
    { type: "scatter", mode: "lines", ...lines, line: { color: colour("cloud"), width: 1 }, hoverinfo: "skip" },
    { type: "scatter", mode: "markers", x: dots.x, y: dots.y, hovertemplate: dots.about, marker: { color: colour("front"), size: 9 }, cliponaxis: false },
    // Points that are not seen keep the labels above those that are.
    { type: "scatter", mode: "markers+text", ...labels, textposition: "top center", marker: { size: 9, opacity: 0 }, textfont: { size: 11 }, hoverinfo: "skip", cliponaxis: false },
  ], { showlegend: false, xaxis: { title: { text: `mean<br>${text(one.title)}` }, range, ...linear(one.unit, range) }, yaxis: { ticksuffix: " ", range: [-0.5, parameters.length - 0.2] } }, { displayModeBar: false });
}

// ---- how the search went

function history() {
  const over = byId("history-x").value, search = data.history;
  const title = byId("history-x").selectedOptions[0].textContent;
  const end = search.end[over === "trials" ? 0 : 1];
  search.courses.forEach((course, i) => {
    const best = [...course.best], steps = [...(over === "trials" ? course.steps : course.step_seconds)];
    if (best.length) { best.push(best.at(-1)); steps.push(end); }
    draw(box("courses", `course-${i}`, 300), [
      { type: "scatter", mode: "markers", name: "trials", x: over === "trials" ? course.trials : course.seconds, y: course.values, customdata: course.numbers, hovertemplate: "trial %{customdata}: %{y}<extra></extra>", marker: { color: colour("cloud"), size: 5, opacity: 0.6 } },
      { type: "scatter", mode: "lines", name: "best so far", x: steps, y: best, line: { shape: "hv", color: colour("front"), width: 2 } },
    ], { xaxis: { title: { text: title } }, yaxis: { title: { text: text(course.title) }, ...linear(course.unit, course.values) } });
  });
  if (search.missing) {
    byId("volume").textContent = `Not shown: ${search.missing}.`;
  } else {
    draw(box("volume", "volume-plot", 300), [
      { type: "scatter", mode: "lines", x: search[over], y: search.volume, line: { shape: "hv", color: colour("volume"), width: 2 }, hovertemplate: "%{x}: %{y:.4f}<extra></extra>" },
    ], { xaxis: { title: { text: title } }, yaxis: { title: { text: "hypervolume" }, range: [0, 1.02] } });
  }
}

// ---- parallel coordinates

function parallel() {
  const lines = data.parallel;
  const left = lines.left_out ? ` Not drawn: ${lines.left_out}.` : "";
  const part = lines.note.includes(" of ") ? " (the front, and others from wherever there are any)" : "";
  byId("parallel-note").textContent = `${lines.note} as lines${part}, the front in colour; a click shows one.${left}`;
  const across = lines.axes.map((_, i) => i);
  const pick = (line) => lines.rows.map((_, i) => i).filter((i) => lines.front[i] === line);
  const joined = (rows) => ({
    x: rows.flatMap(() => [...across, null]), y: rows.flatMap((i) => [...lines.heights.map((h) => h[i]), null]),
    customdata: rows.flatMap((i) => Array(across.length + 1).fill(data.number[lines.rows[i]])),
  });
  const ticks = lines.axes.flatMap((axis, i) => axis.ticks.map(([height, label]) => ({
    x: i, y: height, text: text(label), showarrow: false, xanchor: "left", xshift: 4, font: { size: 11 }, bgcolor: colour("paper"), borderpad: 1, opacity: 0.9,
  })));
  const line = { type: "scatter", mode: "lines", hovertemplate: "trial %{customdata}<extra></extra>" };
  // Titles run down to the right: the last ones need room beside the axes, the longest one below.
  const angle = (25 * Math.PI) / 180, titles = lines.axes.map((axis) => wide(axis.title, narrow() ? 11 : 13));
  const last = Math.max(...(lines.axes.at(-1)?.ticks ?? []).map(([, label]) => wide(label, 11)), 0);
  const right = Math.max(last + 10, (titles.at(-1) ?? 0) * Math.cos(angle) + 10), below = Math.max(...titles, 0) * Math.sin(angle) + 40;
  const beside = Math.max(0, ...lines.axes.flatMap((axis) => axis.ticks.map(([, label]) => wide(label, 11))));
  byId("lines").style.minWidth = `${Math.max(320, Math.max(90, beside + 20) * (lines.axes.length - 1) + right + 20)}px`;
  draw("lines", [
    { ...line, ...joined(pick(false)), name: "trials", opacity: 0.5, line: { color: colour("cloud"), width: 1 } },
    { ...line, ...joined(pick(true)), name: "front", line: { color: colour("front"), width: 2 } },
  ], {
    annotations: ticks, margin: { l: 20, r: right, t: 10, b: below }, dragmode: false,
    shapes: across.map((i) => ({ type: "line", x0: i, x1: i, y0: 0, y1: 1, line: { color: colour("ink"), width: 1 } })),
    xaxis: { tickvals: across, ticktext: lines.axes.map((a) => text(a.title)), tickangle: 25, ticklabeloverflow: "allow", showgrid: false, zeroline: false, automargin: false, range: [-0.02, across.length - 0.98] },
    yaxis: { visible: false, range: [-0.02, 1.02] },
  });
}

function everything() {
  front();
  data.influences.forEach(importance);
  data.influences.forEach(effects);
  history();
  parallel();
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  byId("theme").textContent = dark ? "Light" : "Dark";
}

const prefers = window.matchMedia("(prefers-color-scheme: dark)");
theme(prefers.matches);
prefers.addEventListener("change", (event) => { theme(event.matches); everything(); });
byId("theme").addEventListener("click", () => { theme(document.documentElement.dataset.theme !== "dark"); everything(); });
byId("history-x").addEventListener("change", history);
fillFront();
everything();
for (const id of ["front-plot", "lines"]) {
  byId(id).on("plotly_click", ({ points }) => {
    const trial = points[0].customdata;
    if (places.has(trial)) choose(trial, false);
  });
}
document.documentElement.dataset.ready = "yes";
