"use strict";
(() => {
// Everything a reader or a model could have written reaches the page as a text node, never as markup.
const result = JSON.parse(document.getElementById("result").textContent);
const settings = result.settings ?? {}, machine = result.machine ?? {}, maps = result.tile_maps ?? {};
const methods = [...result.methods].sort((a, b) => (b.method === "dense") - (a.method === "dense"));
const dense = methods.find(m => m.method === "dense");
const names = [...new Set([...methods.map(m => m.method),
  ...(result.lengths ?? []).flatMap(row => Object.keys(row.methods ?? {}))])];

const byId = id => document.getElementById(id);
const known = v => typeof v === "number";
const sorted = values => [...new Set(values)].sort((a, b) => a - b);
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const say = v => (v !== null && typeof v === "object" ? JSON.stringify(v) : String(v));
const short = text => (text.length > 22 ? text.slice(0, 21) + "…" : text);

// Three significant digits everywhere; whole numbers above a thousand keep their commas.
const exact = new Intl.NumberFormat("en-US", {minimumSignificantDigits: 3, maximumSignificantDigits: 3});
const loose = new Intl.NumberFormat("en-US", {maximumSignificantDigits: 3});
const whole = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
const tiny = v => v !== 0 && Math.abs(v) < 1e-4;
const number = v => (v === 0 ? "0" : tiny(v) ? v.toExponential(2) : exact.format(v)).replace("-", "\u2212");
const plain = v => (tiny(v) ? v.toExponential(1) : loose.format(v)).replace("-", "\u2212");
const percent = v => loose.format(100 * v), percent3 = v => number(100 * v);
const signed = v => (v > 0 ? "+" : "") + number(v);
const tokens = v => whole.format(v);

/* Header */
const compared = methods.length > 6 ? `${methods.length} methods` : methods.map(m => m.method).join(", ") || "no method";
byId("headline").textContent = `${compared} on ${settings.model ?? "a model"}`;
document.title = `Tilewise compare: ${settings.model ?? ""}`;
byId("advice").textContent = result.advice ?? "No advice: too little was measured.";
byId("command").textContent = result.command ?? "";
if (result.partial) {
  byId("partial-banner").textContent = "Measured in part: interrupted. What had been measured by then is shown.";
  byId("partial-banner").hidden = false;
}
function facts(title, pairs) {
  const kept = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html("div", {}, html("h2", {}, title),
    html("dl", {}, kept.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, say(value))])));
}
const heads = known(settings.heads)
  ? `${settings.heads} (${settings.kv_heads ?? "?"} key/value), ${settings.head_dim ?? "?"} wide` : null;
byId("facts").append(
  facts("Machine", [["cpu", machine.cpu], ["cores", machine.cores],
    ["memory", known(machine.memory_gb) ? `${plain(machine.memory_gb)} GB` : null],
    ["device", machine.device_name ? `${machine.device} (${machine.device_name})` : machine.device], ["system", machine.os],
    ["python", machine.python], ["torch", machine.torch], ["transformers", machine.transformers]]),
  facts("Model and text", [["model", settings.model], ["layers", settings.layers], ["heads", heads],
    ["context", known(settings.context) ? `${tokens(settings.context)} tokens` : null], ["text", settings.text],
    ["measured on", known(settings.tokens) ? `${tokens(settings.tokens)} tokens` : null],
    ["begins", settings.text_preview ? `“${settings.text_preview}”` : null]]),
  facts("Measurement", [["dtype", settings.dtype], ["tasks", (settings.tasks ?? []).join(", ")], ["seed", settings.seed],
    ["repeats", known(settings.repeats) ? `${settings.repeats} after ${settings.warmup ?? 0} to warm up` : null],
    ["threads", settings.threads], ["created", result.created], ["tilewise", result.tilewise]]));
byId("footer").textContent = "This page is complete in itself: it loads nothing and works offline.";

/* Table */
const tasks = [...new Set(methods.flatMap(m => Object.keys(m.tasks ?? {})))];
const field = (key, label, unit, group, more) => ({key, label, unit, group, value: m => m[key], format: number, ...more});
const lower = {better: -1, tolerance: 0.02};
const spread = key => ({range: m => [m[key + "_low"], m[key + "_high"]]});
const some = names => (names.slice(0, 2).join(", ") || "none") + (names.length > 2 ? ` and ${names.length - 2} more` : "");
const ranking = result.ranking ?? [], place = m => ranking.findIndex(entry => entry.method === m.method);
const columns = [
  field("method", "method", "", "", {words: true, name: true}),
  ...(ranking.length ? [
    field("rank", "rank", "", "Rank", {format: String, value: m => (place(m) < 0 ? null : place(m) + 1)}),
    field("outdone_by", "outdone by", "", "Rank", {words: true, value: m => (place(m) < 0 ? null
      : some(ranking[place(m)].outdone_by))})] : []),
  field("engine", "engine", "", "What ran", {words: true}),
  field("density", "density", "% of tiles", "What ran", {format: percent3}),
  field("prefill_ms", "prefill", "ms", "Time", {...lower, ...spread("prefill_ms")}),
  field("prefill_speedup", "speed-up", "× dense", "Time", {better: 1, tolerance: 0.02, ...spread("prefill_speedup")}),
  field("first_call_ms", "first call", "ms", "Time", lower),
  field("choose_ms", "choosing", "ms of prefill", "Time"),
  field("attention_ms", "attention", "ms", "Time", lower),
  field("decode_ms_per_token", "decode", "ms / token", "Time", lower),
  field("peak_mb", "peak", "MB", "Memory", lower),
  field("bits_per_byte", "bits / byte", "", "Quality", {better: -1, tolerance: 0.001}),
  field("bits_per_byte_change", "change", "bits / byte", "Quality", {format: signed}),
  field("kl_mean", "KL mean", "nats", "Quality"),
  field("kl_p99", "KL 99th", "nats", "Quality"),
  field("top1_agreement", "top-1 same", "%", "Quality", {format: percent3}),
  ...tasks.map(task => field(task, task, "% right", "Retrieval", {better: 1, tolerance: 0, format: percent3, task,
    value: m => m.tasks?.[task]?.accuracy, range: m => [m.tasks?.[task]?.low, m.tasks?.[task]?.high]})),
  field("modes", "modes", "", "How", {words: true, value: m => m.modes?.join(", ")}),
  field("reads", "reads", "", "How", {words: true, long: true}),
  field("needs", "needs", "", "How", {words: true}),
  field("lookahead", "looks ahead", "", "How", {words: true}),
  field("parameters", "parameters", "", "How", {words: true, long: true, value: m => Object.entries(m.parameters ?? {})
    .map(([name, value]) => `${name}=${say(value)}`).join(", ") || "none"}),
  field("paper", "paper", "", "How", {words: true, long: true,
    value: m => (m.paper ? `${m.paper.title} (${m.paper.id})` : "none")}),
];
const reason = (column, m) => m.reasons?.[column.key] ?? m.reasons?.[`tasks.${column.key}`] ??
  (column.task ? m.reasons?.tasks ?? result.task_notes?.[column.task] : null) ??
  (result.partial ? "not reached before the interruption" : "not measured");

// The change in bits per byte says the same as bits per byte, so it carries that column's verdict.
function verdict(column, m) {
  if (column.key === "bits_per_byte_change") return verdict(columns.find(c => c.key === "bits_per_byte"), m);
  const value = column.value(m), base = dense && column.value(dense);
  if (!column.better || m === dense || !known(value) || !known(base)) return "";
  const own = column.range?.(m) ?? [], other = column.key === "prefill_speedup" ? [1, 1] : column.range?.(dense) ?? [];
  const [low, high, from, to] = [...own, ...other].every(known) && own.length === 2 && other.length === 2
    ? [...own, ...other] : [value, value, base - column.tolerance * Math.abs(base), base + column.tolerance * Math.abs(base)];
  const side = low > to ? 1 : high < from ? -1 : 0;
  return side === 0 ? "" : side === column.better ? "better" : "worse";
}

const notes = [];
const look = c => ["words", "long", "name", "first"].filter(word => c[word]).join(" ");
function cell(column, m) {
  const value = column.value(m);
  const kind = look(column);
  if (value === null || value === undefined) {
    const why = reason(column, m);
    if (!notes.includes(why)) notes.push(why);
    const index = notes.indexOf(why) + 1;
    return html("td", {class: kind, "data-column": column.key}, html("span", {class: "null", title: why}, "–"),
      html("sup", {}, html("a", {href: `#note-${index}`, "aria-label": `note ${index}: ${why}`}, index)));
  }
  if (column.words) return html("td", {class: kind, "data-column": column.key}, html("span", {}, say(value)));
  const side = verdict(column, m), range = column.range?.(m) ?? [];
  return html("td", {class: kind, "data-column": column.key},
    side ? html("span", {class: `mark ${side}`, title: `${side} than dense`},
      html("span", {"aria-hidden": "true"}, side === "better" ? "▲" : "▼"), html("span", {class: "hush"}, side)) : null,
    html("span", {class: side || null}, column.format(value)),
    range.length && range.every(known)
      ? html("span", {class: "range"}, `${column.format(range[0])} – ${column.format(range[1])}`) : null);
}

let sorting = {key: null, direction: 1};
function fillTable() {
  const column = columns.find(c => c.key === sorting.key);
  const order = [...methods];
  if (column) order.sort((a, b) => {
    const [x, y] = [column.value(a) ?? null, column.value(b) ?? null];
    if (x === null || y === null) return (x === null) - (y === null);
    return sorting.direction * (known(x) && known(y) ? x - y : say(x).localeCompare(say(y)));
  });
  byId("methods-table").tBodies[0].replaceChildren(...order.map(m =>
    html("tr", {class: m === dense ? "dense" : null, "data-method": m.method}, columns.map(c => cell(c, m)))));
  for (const th of byId("methods-table").querySelectorAll("th[data-column]")) {
    const on = th.dataset.column === sorting.key;
    th.setAttribute("aria-sort", !on ? "none" : sorting.direction > 0 ? "ascending" : "descending");
    th.querySelector(".arrow").textContent = !on ? "" : sorting.direction > 0 ? "↑" : "↓";
  }
}
function sortBy(key) {  // up, down, and the third time back to dense first
  if (sorting.key !== key) sorting = {key, direction: 1};
  else sorting = sorting.direction > 0 ? {key, direction: -1} : {key: null, direction: 1};
  fillTable();
}
function makeTable() {
  const groups = [];
  for (const column of columns) {
    column.first = column.group !== "" && groups.at(-1)?.group !== column.group;
    if (groups.at(-1)?.group === column.group) groups.at(-1).span += 1;
    else groups.push({group: column.group, span: 1});
  }
  byId("methods-table").append(html("thead", {},
    html("tr", {}, groups.map(({group, span}) => html("th", {colspan: span, scope: "colgroup",
      class: group ? "first" : "name"}, group))),
    html("tr", {}, columns.map(c => html("th", {scope: "col", "data-column": c.key,
      class: look(c)}, html("button", {type: "button", click: () => sortBy(c.key)}, c.words ? c.label : null,
      html("span", {class: "arrow", "aria-hidden": "true"}), c.words ? null : c.label,
      html("span", {class: "unit"}, c.unit || "\u00a0")))))), html("tbody"));
  fillTable();
  const untaken = Object.entries(result.task_notes ?? {}).map(([task, note]) => html("p", {}, `${task}: ${note}`));
  byId("methods-notes").append(
    notes.length ? html("ol", {}, notes.map((why, i) => html("li", {id: `note-${i + 1}`}, why))) : "", ...untaken,
    html("p", {}, html("span", {class: "better"}, "▲ better"), " and ", html("span", {class: "worse"}, "▼ worse"),
      " than dense: the intervals (small figures) do not overlap or, where there is none, the values differ by " +
      "more than 2 % (bits per byte: 0.1 %). KL and top-1 are distances from dense and carry no mark. Prefill is the " +
      "median of the repeats and contains the time spent choosing tiles; the first call is shown apart. Looks ahead: " +
      "“tile” or “prompt” means that later tokens of the tile or of the whole prompt take part in the choice. " +
      "Rank: methods as good as dense by their speed, then the others by the bits per byte they lose; a method is outdone " +
      "by those at least as fast and at least as good in everything."));
}
makeTable();

/* Charts */
const early = result.partial ? " before the interruption." : ".";
const redraws = [];
const draw = f => { redraws.push(f); f(); };
function missing(host, line) {
  const figure = host.closest(".figure");
  figure.replaceWith(html("p", {class: "missing"}, line));
}
const tip = byId("tip");
function withTip(node, text) {
  const show = () => {
    const box = node.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${scrollX + Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${scrollY + (box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 8 : box.bottom + 8)}px`;
  };
  const hide = () => { tip.hidden = true; };
  return build(node, {tabindex: 0, role: "img", "aria-label": text,
    mouseenter: show, focus: show, mouseleave: hide, blur: hide}, []);
}
const colour = name => `--colour: var(--series-${names.indexOf(name) % 8})`;
const SHAPES = [
  "M-6 0L0-6L6 0L0 6Z", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z", "M-5-5H5V5H-5Z", "M0-6L6 5H-6Z", "M0 6L6-5H-6Z",
  "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", "M0-6L6-1L4 6H-4L-6-1Z", "M-6-5L0-2L6-5L3 0L6 5L0 2L-6 5L-3 0Z"];
// Past eight methods colours come round again, with the next shape.
const shape = name => SHAPES[(names.indexOf(name) + Math.floor(names.indexOf(name) / 8)) % SHAPES.length];
const marker = (name, x, y, kind = "point") =>
  svg("path", {class: kind, d: shape(name), transform: `translate(${x} ${y})`});
function scale([from, to], [start, end], log) {
  const f = log ? Math.log : v => v;
  return v => start + (f(v) - f(from)) / (f(to) - f(from) || 1) * (end - start);
}
function linearTicks([from, to], count) {
  const raw = (to - from) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find(s => s * power >= raw) * power;
  const ticks = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(10)));
  return ticks;
}
function logTicks([from, to]) {
  const steps = to / from > 300 ? [1] : to / from > 30 ? [1, 3] : [1, 2, 5], ticks = [];
  for (let e = Math.floor(Math.log10(from)); e <= Math.log10(to); e++)
    for (const s of steps) if (s * 10 ** e >= from * 0.999 && s * 10 ** e <= to * 1.001) ticks.push(s * 10 ** e);
  return ticks;
}
function chart(host, {x, y, right, label}) {
  const width = Math.max(host.clientWidth, 260), height = Math.round(Math.min(440, Math.max(300, width * 0.45)));
  const left = 58, bottom = height - 46, top = 26;
  const px = scale(x.domain, [left, width - right], x.log), py = scale(y.domain, [bottom, top], y.log);
  const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label});
  for (const tick of y.ticks) root.append(svg("line", {class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick)}),
    svg("text", {x: left - 8, y: py(tick) + 4, "text-anchor": "end"}, y.format(tick)));
  let free = -Infinity;
  for (const tick of x.ticks) {
    root.append(svg("line", {class: "grid", x1: px(tick), x2: px(tick), y1: top, y2: bottom}));
    if (px(tick) < free) continue;  // on a narrow window some tick labels would touch
    root.append(svg("text", {x: px(tick), y: bottom + 18, "text-anchor": "middle"}, x.format(tick)));
    free = px(tick) + 7 * x.format(tick).length + 10;
  }
  root.append(svg("path", {class: "frame", d: `M${left} ${top}V${bottom}H${width - right}`}),
    svg("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle"}, x.label),
    svg("text", {x: 4, y: 14}, y.label));
  host.replaceChildren(root);
  return {root, px, py, left, top, bottom, edge: width - right, width};
}

/* Quality against time */
const axes = [
  {name: "change in bits per byte", key: "bits_per_byte_change", better: -1, format: signed,
    tick: v => (v > 0 ? "+" : "") + plain(v)},
  {name: "mean KL to dense (nats)", key: "kl_mean", better: -1, format: number, tick: plain},
  {name: "99th-percentile KL to dense (nats)", key: "kl_p99", better: -1, format: number, tick: plain},
  {name: "same top-1 token as dense (%)", key: "top1_agreement", better: 1, format: percent, tick: percent},
  ...tasks.map(task => ({name: `${task} accuracy (%)`, task, better: 1, format: percent, tick: percent})),
].map(axis => ({...axis, value: m => (axis.task ? m.tasks?.[axis.task]?.accuracy : m[axis.key])}))
  .filter(axis => methods.some(m => known(m.prefill_ms) && known(axis.value(m))));

function front(points, better) {
  return points.filter(p => !points.some(q => q !== p && q.x <= p.x && better * (q.y - p.y) >= 0 && (q.x < p.x || q.y !== p.y)))
    .sort((a, b) => a.x - b.x);
}
function widen(values, share) {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}
function drawQuality() {
  const axis = axes[byId("quality-axis").selectedIndex];
  const points = methods.filter(m => known(m.prefill_ms) && known(axis.value(m))).map(m => ({m, x: m.prefill_ms, y: axis.value(m),
    xs: [m.prefill_ms_low, m.prefill_ms_high], ys: axis.task ? [m.tasks[axis.task].low, m.tasks[axis.task].high] : []}));
  const ends = p => p.xs.concat(p.x).filter(known), tips = p => p.ys.concat(p.y).filter(known);
  const all = points.flatMap(ends), log = Math.max(...all) > 12 * Math.min(...all) && Math.min(...all) > 0;
  const xDomain = log ? [Math.min(...all) / 1.2, Math.max(...all) * 1.3] : [0, Math.max(...all) * 1.12];
  const yDomain = widen(points.flatMap(tips), 0.1);
  const c = chart(byId("plot-quality"), {right: 24, label: `prefill time against ${axis.name}`,
    x: {domain: xDomain, log, ticks: log ? logTicks(xDomain) : linearTicks(xDomain, 7), format: plain,
      label: `prefill at ${known(settings.tokens) ? tokens(settings.tokens) : "?"} tokens (ms), less is better`},
    y: {domain: yDomain, ticks: linearTicks(yDomain, 6), format: axis.tick,
      label: `${axis.name}, ${axis.better > 0 ? "more" : "less"} is better`}});
  const best = front(points, axis.better);
  const path = best.map((p, i) => (i ? `H${c.px(p.x)}V${c.py(p.y)}` : `M${c.px(p.x)} ${c.py(p.y)}`)).join("");
  const [start, far] = axis.better > 0 ? [c.bottom, c.bottom] : [c.top, c.top];
  c.root.append(svg("path", {class: "dominated", d: `M${c.px(best[0].x)} ${start}L${path.slice(1)}H${c.edge}V${far}Z`}),
    svg("path", {class: "front", d: path}),
    svg("text", {class: "corner", x: c.left + 10, y: axis.better > 0 ? c.top + 16 : c.bottom - 10},
      `${axis.better > 0 ? "↖" : "↙"} faster and better`));
  for (const p of points) {
    const [x, y] = [c.px(p.x), c.py(p.y)], group = svg("g", {style: colour(p.m.method)});
    if (p.xs.every(known)) group.append(svg("path", {class: "bar", d: `M${c.px(p.xs[0])} ${y}H${c.px(p.xs[1])}`}));
    if (p.ys.length && p.ys.every(known))
      group.append(svg("path", {class: "bar", d: `M${x} ${c.py(p.ys[0])}V${c.py(p.ys[1])}`}));
    group.append(marker(p.m.method, x, y, best.includes(p) ? "point" : "point beaten"));
    c.root.append(withTip(group, `${p.m.method}\nprefill ${number(p.x)} ms\n${axis.name}: ${axis.format(p.y)}\n` +
      (best.includes(p) ? "on the Pareto front" : "another method is at least as fast and as good")));
  }
  placeLabels(c, points.map(p => ({text: short(p.m.method), x: c.px(p.x), y: c.py(p.y)})));
  byId("quality-caption").textContent = `Dashed: the Pareto front (${best.map(p => p.m.method).join(", ")}). ` +
    "Hollow: another method is at least as fast and as good. Bars: low to high.";
}
// Tries the four sides of each point and takes the first that touches no point and no label.
function placeLabels(c, labels) {
  const taken = labels.map(l => [l.x - 8, l.y - 8, l.x + 8, l.y + 8]);
  for (const l of labels) {
    const w = 7.4 * l.text.length;
    const [east, west, middle] = [l.x + 12, l.x - w - 12, l.x - w / 2];
    const spots = [[east, l.y - 8], [west, l.y - 8], [middle, l.y - 27], [middle, l.y + 11], [east, l.y + 6], [west, l.y + 6]];
    const clash = ([x, y]) => taken.filter(t => x < t[2] && x + w > t[0] && y < t[3] && y + 16 > t[1]).length +
      (x < c.left || x + w > c.width || y < c.top - 6 || y + 16 > c.bottom ? 10 : 0);
    const [x, y] = spots.reduce((best, spot) => (clash(spot) < clash(best) ? spot : best));
    taken.push([x, y, x + w, y + 16]);
    c.root.append(svg("text", {class: "strong", x, y: y + 12, "aria-hidden": "true"}, l.text));
  }
}
if (axes.length) {
  byId("quality-axis").append(...axes.map(axis => html("option", {}, axis.name)));
  byId("quality-axis").addEventListener("change", drawQuality);
  draw(drawQuality);
} else missing(byId("plot-quality"), "No plot: no method has both a prefill time and a measure of quality.");

/* Time against length */
const lengths = (result.lengths ?? []).filter(row => known(row.tokens)).sort((a, b) => a.tokens - b.tokens);
function series(name) {
  return lengths.map(row => ({tokens: row.tokens, ...row.methods?.[name]})).filter(p => known(p.ms) && p.ms > 0);
}
// Dense time between two measured lengths, read off the straight line of the log-log plot.
function denseAt(at) {
  const line = series("dense"), i = line.findIndex(p => p.tokens >= at);
  if (i < 0 || !line.length || at < line[0].tokens) return null;
  if (line[i].tokens === at) return line[i].ms;
  return Math.exp(scale([line[i - 1].tokens, line[i].tokens], [Math.log(line[i - 1].ms), Math.log(line[i].ms)], true)(at));
}
function drawLatency() {
  const host = byId("plot-latency"), wide = host.clientWidth > 600;
  const lines = names.map(name => ({name, points: series(name)})).filter(l => l.points.length);
  const all = lines.flatMap(l => l.points), times = all.flatMap(p => [p.ms, p.low, p.high]).filter(v => known(v) && v > 0);
  const xs = lengths.map(row => row.tokens), yDomain = [Math.min(...times) / 1.15, Math.max(...times) * 1.15];
  const xDomain = [xs[0] / 1.12, xs.at(-1) * 1.12];
  const c = chart(host, {right: wide ? 150 : 16, label: "prefill time against length, both axes logarithmic",
    x: {domain: xDomain, log: true, ticks: xs, format: tokens, label: "length (tokens)"},
    y: {domain: yDomain, log: true, ticks: logTicks(yDomain), format: plain, label: "prefill (ms), less is better"}});
  for (const {name, points} of lines) {
    const group = svg("g", {style: colour(name)});
    group.append(svg("path", {class: "curve", d: "M" + points.map(p => `${c.px(p.tokens)} ${c.py(p.ms)}`).join("L")}));
    for (const p of points) {
      const spot = svg("g", {}), x = c.px(p.tokens);
      const barred = known(p.low) && known(p.high) && p.low > 0, [low, high] = barred ? [c.py(p.low), c.py(p.high)] : [];
      if (barred) spot.append(svg("path", {class: "bar", d: `M${x} ${low}V${high}M${x - 4} ${low}h8M${x - 4} ${high}h8`}));
      spot.append(marker(name, x, c.py(p.ms)));
      const base = lengths.find(row => row.tokens === p.tokens).methods?.dense?.ms;
      group.append(withTip(spot, `${name}, ${tokens(p.tokens)} tokens\n${number(p.ms)} ms` +
        (barred ? ` (${number(p.low)} – ${number(p.high)})` : "") +
        (name !== "dense" && known(base) ? `\n${number(base / p.ms)} × dense` : "")));
    }
    c.root.append(group);
  }
  for (const crossing of result.crossovers ?? []) {
    const ms = known(crossing.tokens) ? denseAt(crossing.tokens) : null;
    if (ms === null) continue;
    const [x, y] = [c.px(crossing.tokens), c.py(ms)];
    c.root.append(withTip(svg("g", {style: colour(crossing.method), class: "crossover"},
      svg("path", {class: "drop", d: `M${x} ${y + 9}V${c.bottom}`}), svg("circle", {class: "crossing", cx: x, cy: y, r: 9})),
    `${crossing.method} starts to pay at ${tokens(crossing.tokens)} tokens\n${crossing.note ?? ""}`));
  }
  if (wide) endLabels(c, lines);
  else c.root.after(html("p", {class: "caption"}, lines.map(l => html("span", {class: "key"},
    svg("svg", {viewBox: "-8 -8 16 16", style: colour(l.name)}, marker(l.name, 0, 0)), short(l.name)))));
}
function endLabels(c, lines) {
  const ends = lines.map(({name, points}) => ({name, at: c.py(points.at(-1).ms), x: c.px(points.at(-1).tokens)}))
    .sort((a, b) => a.at - b.at);
  let y = c.top;
  const overflow = ends.map(e => (y = Math.max(e.at, y + 17))).at(-1) - c.bottom;
  y = c.top - Math.max(overflow, 0);
  for (const e of ends) {
    y = Math.max(e.at - Math.max(overflow, 0), y + 17);
    c.root.append(svg("g", {style: colour(e.name)}, svg("path", {class: "bar", d: `M${e.x + 9} ${e.at}L${c.edge + 8} ${y}`}),
      svg("text", {class: "strong", x: c.edge + 12, y: y + 4, style: "fill: var(--colour)"}, short(e.name))));
  }
}
if (lengths.some(row => Object.values(row.methods ?? {}).some(v => known(v?.ms) && v.ms > 0))) {
  draw(drawLatency);
  byId("crossovers").append(...(result.crossovers ?? []).map(({method, tokens: at, note}) => html("li", {}, `${method}: ` +
    (known(at) ? `faster than dense from ${tokens(at)} tokens${denseAt(at) === null ? ", outside the lengths drawn" : " (ring)"}`
      : "no length at which it pays") + (note ? `; ${note}` : ""))));
} else missing(byId("plot-latency"), "No plot: the time was not measured at more than one length" + early);

/* Retrieval heat map */
const heat = (result.heatmap ?? []).filter(map => map.cells?.length);
function fillSelect(select, options, text = say) {
  const before = select.value;
  select.replaceChildren(...options.map(option => html("option", {value: option}, text(option))));
  if (options.map(String).includes(before)) select.value = before;
}
function drawHeat() {
  const mine = heat.filter(map => map.method === byId("heatmap-method").value);
  fillSelect(byId("heatmap-task"), mine.map(map => map.task));
  const {method, task, cells} = mine.find(map => map.task === byId("heatmap-task").value);
  const xs = sorted(cells.map(cell => cell.length)), ys = sorted(cells.map(cell => cell.depth));
  const host = byId("heatmap"), left = 58, top = 8, h = 36;
  const width = Math.max(host.clientWidth, 260), floor = top + h * ys.length, height = floor + 44;
  const w = Math.min(170, (width - left - 4) / xs.length);
  const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `${task} accuracy of ${method} by length and depth, in per cent`});
  const word = (x, y, text, anchor = "middle") => svg("text", {x, y, "text-anchor": anchor}, text);
  ys.forEach((depth, i) => root.append(word(left - 8, top + h * (i + 0.5) + 4, `${percent(depth)} %`, "end")));
  xs.forEach((length, i) => root.append(word(left + w * (i + 0.5), floor + 18, tokens(length))));
  for (const cell of cells) {
    const x = left + w * xs.indexOf(cell.length), y = top + h * ys.indexOf(cell.depth);
    const share = known(cell.accuracy) ? cell.accuracy : null;
    const box = svg("rect", {class: "cell", x, y, width: w, height: h, rx: 4});
    box.style.fill = share === null ? "var(--soft)" : `color-mix(in oklab, var(--heat-1) ${100 * share}%, var(--heat-0))`;
    const text = word(x + w / 2, y + h / 2 + 5, share === null ? "–" : percent(share));
    text.setAttribute("class", "number");
    text.style.fill = share > 0.5 ? "var(--heat-ink-1)" : "var(--heat-ink-0)";
    root.append(svg("g", {}, svg("title", {}, `${tokens(cell.length)} tokens, depth ${percent(cell.depth)} %: ` +
      (share === null ? cell.reason ?? "not measured" : `${percent(share)} % right of ${cell.n ?? "?"}`)), box, text));
  }
  const side = word(12, (top + floor) / 2, "depth");
  side.setAttribute("transform", `rotate(-90 12 ${(top + floor) / 2})`);
  root.append(word(left + w * xs.length / 2, height - 6, "length (tokens)"), side);
  host.replaceChildren(root);
  const counts = sorted(cells.map(cell => cell.n).filter(known));
  byId("heatmap-caption").textContent =
    "Accuracy in per cent. Depth: where the thing to retrieve stands, 0 % is the start of the text." +
    (counts.length ? ` Each cell: ${counts.length > 1 ? `${counts[0]} to ${counts.at(-1)}` : counts[0]} trials.` : "");
}
if (heat.length) {
  fillSelect(byId("heatmap-method"), [...new Set(heat.map(map => map.method))]);
  for (const id of ["heatmap-method", "heatmap-task"]) byId(id).addEventListener("change", drawHeat);
  draw(drawHeat);
} else missing(byId("heatmap"), "No heat map: no retrieval task was measured by depth and length" + early);

/* Tile maps */
function bytes(text, count) {
  try {
    const raw = atob(text);
    return raw.length === count ? Uint8Array.from(raw, ch => ch.charCodeAt(0)) : null;
  } catch { return null; }
}
const cache = new Map();
const remember = (key, make) => (cache.has(key) ? cache.get(key) : cache.set(key, make()).get(key));
const at = (list, layer, head) => list?.find(map => map.layer === layer && map.head === head);
// Shares of each row's attention mass; dividing by the row's sum undoes the rounding to 8 bits.
function massOf(layer, head) {
  return remember(`mass ${layer} ${head}`, () => {
    const map = at(maps.mass, layer, head), data = map && bytes(map.data, map.rows * map.cols);
    if (!data) return null;
    const share = new Float64Array(data.length);
    for (let r = 0; r < map.rows; r++) {
      let sum = 0;
      for (let i = r * map.cols; i < (r + 1) * map.cols; i++) sum += share[i] = (data[i] / 255) ** 2;
      for (let i = r * map.cols; i < (r + 1) * map.cols; i++) share[i] /= sum || 1;
    }
    return {rows: map.rows, cols: map.cols, share};
  });
}
function keptOf(method, layer, head) {
  return remember(`kept ${layer} ${head} ${method}`, () => {
    const map = at(maps.kept?.filter(m => m.method === method), layer, head);
    const data = map && bytes(map.bits, Math.ceil(map.rows * map.cols / 8));
    if (!data) return null;
    const on = Uint8Array.from({length: map.rows * map.cols}, (_, i) => data[i >> 3] >> (7 - (i & 7)) & 1);
    return {rows: map.rows, cols: map.cols, on};
  });
}
// A tile is in the future when its first key comes after its last query; no map may hold mass there.
const future = (map, r, c) => c * map.rows >= (r + 1) * map.cols;
const causal = remember("causal", () => !(maps.mass ?? []).some(({layer, head}) => {
  const mass = massOf(layer, head);
  return mass?.share.some((share, i) => share > 0 && future(mass, Math.floor(i / mass.cols), i % mass.cols));
}));
const visible = (map, r, c) => !causal || !future(map, r, c);
// How much of tile (r, c) of the mass map is chosen, when the two maps have different grids.
function overlap(mass, kept, r, c) {
  if (mass.rows === kept.rows && mass.cols === kept.cols) return kept.on[r * kept.cols + c];
  const span = (i, n, m) => {
    const from = i * m / n, to = (i + 1) * m / n, parts = [];
    for (let j = Math.floor(from + 1e-9); j < to - 1e-9; j++)
      parts.push([j, (Math.min(to, j + 1) - Math.max(from, j)) / (to - from)]);
    return parts;
  };
  let sum = 0;
  const columns = span(c, mass.cols, kept.cols);
  for (const [i, a] of span(r, mass.rows, kept.rows)) for (const [j, b] of columns) sum += a * b * kept.on[i * kept.cols + j];
  return sum;
}
function summary(method, layer, head) {
  return remember(`sum ${layer} ${head} ${method}`, () => {
    const mass = massOf(layer, head), kept = keptOf(method, layer, head);
    const out = {mass, kept, density: null, covered: null, best: null};
    if (!kept) return out;
    let seen = 0, paid = 0;
    kept.on.forEach((on, i) => {
      if (!visible(kept, Math.floor(i / kept.cols), i % kept.cols)) return;
      seen += 1;
      paid += on;
    });
    out.density = paid / seen;
    if (!mass) return out;
    let sum = 0;
    mass.share.forEach((share, i) => {
      if (share > 0) sum += share * overlap(mass, kept, Math.floor(i / mass.cols), i % mass.cols);
    });
    out.covered = sum / mass.rows;
    out.same = mass.rows === kept.rows && mass.cols === kept.cols;
    if (out.same) out.best = [...mass.share].sort((a, b) => b - a).slice(0, paid).reduce((a, b) => a + b, 0) / mass.rows;
    return out;
  });
}

function ramp(style, name) {
  const stops = [0, 1, 2].map(i => style.getPropertyValue(`--${name}-${i}`).trim())
    .map(hex => [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16)));
  return Array.from({length: 256}, (_, v) => {
    const t = v / 255, [a, b, u] = t < 0.35 ? [stops[0], stops[1], t / 0.35] : [stops[1], stops[2], (t - 0.35) / 0.65];
    return `rgb(${a.map((from, k) => Math.round(from + (b[k] - from) * u)).join(",")})`;
  });
}
function paint(canvas, {mass, kept}, cursor) {
  const size = Math.round(canvas.clientWidth * Math.max(devicePixelRatio || 1, 1)) || 64;
  const style = getComputedStyle(document.documentElement);
  canvas.width = canvas.height = size;
  const pen = canvas.getContext("2d"), skipped = ramp(style, "skipped"), chosen = ramp(style, "chosen");
  pen.fillStyle = style.getPropertyValue("--hidden");
  pen.fillRect(0, 0, size, size);
  // One grid fine enough for both maps, so that a coarse choice still shows the fine mass under it.
  const rows = Math.max(mass?.rows ?? 1, kept?.rows ?? 1), cols = Math.max(mass?.cols ?? 1, kept?.cols ?? 1);
  const index = (map, r, c) => Math.floor((r + 0.5) * map.rows / rows) * map.cols + Math.floor((c + 0.5) * map.cols / cols);
  const x = c => Math.round(c * size / cols), y = r => Math.round(r * size / rows), grid = {rows, cols};
  const on = (r, c) => kept !== null && r >= 0 && c >= 0 && r < rows && c < cols && visible(grid, r, c) &&
    kept.on[index(kept, r, c)] === 1;
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
    if (!visible(grid, r, c)) continue;
    pen.fillStyle = (on(r, c) ? chosen : skipped)[Math.round(255 * Math.sqrt(mass ? mass.share[index(mass, r, c)] : 0))];
    pen.fillRect(x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r));
  }
  if (kept && size > 150) {
    pen.fillStyle = style.getPropertyValue("--outline");
    const t = Math.max(1, Math.round(size / 420));
    for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
      if (!on(r, c)) continue;
      const [x0, y0, x1, y1] = [x(c), y(r), x(c + 1), y(r + 1)];
      if (!on(r - 1, c)) pen.fillRect(x0, y0, x1 - x0, t);
      if (!on(r + 1, c)) pen.fillRect(x0, y1 - t, x1 - x0, t);
      if (!on(r, c - 1)) pen.fillRect(x0, y0, t, y1 - y0);
      if (!on(r, c + 1)) pen.fillRect(x1 - t, y0, t, y1 - y0);
    }
  }
  if (cursor && mass) {
    pen.strokeStyle = style.getPropertyValue("--cursor");
    pen.lineWidth = Math.max(3, size / 200);
    pen.strokeRect(cursor.c * size / mass.cols, cursor.r * size / mass.rows, size / mass.cols, size / mass.rows);
  }
}

const ALONE = "";  // the choice "attention only", which no method can be named
let cursor = null;
const buttons = () => byId("tile-thumbs").querySelectorAll("button");
const picked = () => ({method: byId("tile-method").value,
  layer: Number(byId("tile-layer").value), head: Number(byId("tile-head").value)});
function drawTiles() {
  const {method, layer, head} = picked(), sum = summary(method, layer, head), info = byId("tile-info");
  if (cursor && sum.mass && (cursor.r >= sum.mass.rows || cursor.c >= sum.mass.cols)) cursor = null;
  paint(byId("tile-viewer"), sum, cursor);
  const where = `Layer ${layer}, head ${head}`;
  if (method === ALONE) info.textContent = `${where}: attention mass of the dense model.`;
  else if (!sum.kept) info.textContent = `${where}: no readable tile map of ${method}.`;
  else info.textContent = `${where}, ${method}: density ${percent(sum.density)} % of the visible tiles` +
    (sum.covered === null ? "; the attention mass was not recorded."
      : `, covering ${percent(sum.covered)} % of the attention mass${sum.same ? "" : " (the grids differ: shared by area)"}.`) +
    (sum.best !== null && method !== "dense" ? ` As many tiles, chosen knowing the mass, could cover ${percent(sum.best)} %.` : "");
  byId("tile-viewer").setAttribute("aria-label", `tile map; arrow keys move between tiles. ${info.textContent}`);
  hover();
}
function hover() {
  const {method, layer, head} = picked(), {mass, kept} = summary(method, layer, head), line = byId("tile-hover");
  if (!cursor || !mass) {
    line.textContent = "Point at a tile, or focus the map and use the arrow keys, to read it.";
    return;
  }
  const {r, c} = cursor, part = kept ? overlap(mass, kept, r, c) : null;
  const span = (i, n) => (known(maps.tokens)
    ? ` (tokens ${tokens(Math.floor(i * maps.tokens / n))}–${tokens(Math.ceil((i + 1) * maps.tokens / n) - 1)})` : "");
  const fate = part === null ? "" : part === 1 ? ", chosen" : part === 0 ? ", not chosen" : `, ${percent(part)} % of it chosen`;
  line.textContent = `Query tile ${r}${span(r, mass.rows)}, key tile ${c}${span(c, mass.cols)}: ` + (visible(mass, r, c)
    ? `${plain(100 * mass.share[r * mass.cols + c])} % of the row's mass${fate}.` : "in the future, not visible.");
}
function moveTo(r, c) {
  const {layer, head} = picked(), mass = massOf(layer, head);
  if (!mass) return;
  const next = {r: Math.max(0, Math.min(mass.rows - 1, r)), c: Math.max(0, Math.min(mass.cols - 1, c))};
  if (next.r === cursor?.r && next.c === cursor?.c) return;
  cursor = next;
  paint(byId("tile-viewer"), summary(picked().method, layer, head), cursor);
  hover();
}
function point(event) {
  const {layer, head} = picked(), mass = massOf(layer, head), box = byId("tile-viewer").getBoundingClientRect();
  const index = (at, length, n) => Math.floor(at / length * n);
  if (mass) moveTo(index(event.clientY - box.top, box.height, mass.rows), index(event.clientX - box.left, box.width, mass.cols));
}
function leave(event) {
  if (event.pointerType === "touch") return;  // lifting the finger must not wipe what the tap just showed
  cursor = null;
  drawTiles();
}
function key(event) {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  moveTo((cursor?.r ?? -1) + step[0], (cursor?.c ?? 0) + step[1]);
}
function drawThumbs() {
  const {method} = picked();
  byId("tile-thumbs").replaceChildren(...tileLayers.map(layer => html("div", {class: "row"}, html("span", {}, `layer ${layer}`),
    tileHeads.map(head => {
      const {covered} = summary(method, layer, head), place = `layer ${layer}, head ${head}`;
      const text = covered === null ? `head ${head}` : `${percent(covered)} %`;
      return html("button", {type: "button", "data-layer": layer, "data-head": head, title: place,
        "aria-label": place + (covered === null ? "" : `: ${text} of the mass covered`),
        click: () => {
          byId("tile-layer").value = layer;
          byId("tile-head").value = head;
          drawTiles();
          markThumb();
        }}, html("canvas", {}), text);
    }))), html("div", {}, method === ALONE ? "All maps recorded." : "All maps recorded, with the share of mass covered."));
  for (const button of buttons())
    paint(button.firstChild, summary(method, Number(button.dataset.layer), Number(button.dataset.head)));
  markThumb();
}
function markThumb() {
  const {layer, head} = picked();
  for (const button of buttons())
    button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === layer && Number(button.dataset.head) === head));
}
const tileKeys = [...(maps.mass ?? []), ...(maps.kept ?? [])];
const tileLayers = sorted(tileKeys.map(map => map.layer)), tileHeads = sorted(tileKeys.map(map => map.head));
if (tileKeys.length) {
  const choices = [...new Set((maps.kept ?? []).map(map => map.method))];
  fillSelect(byId("tile-layer"), tileLayers);
  fillSelect(byId("tile-head"), tileHeads);
  fillSelect(byId("tile-method"), [...choices, ALONE], name => (name === ALONE ? "attention only" : name));
  byId("tile-method").value = choices.find(name => name !== "dense") ?? choices[0] ?? ALONE;
  byId("tile-legend").append(...[["chosen", "chosen tile"], ["skipped", "skipped tile"]].flatMap(([name, text]) =>
    [html("span", {}, text), html("span", {class: `ramp ${name}`})]), html("span", {}, "share of the row's mass"),
  html("span", {class: "ticks"}, [0, 0.1, 0.4, 1].map(share =>
    html("span", {style: `left: ${100 * Math.sqrt(share)}%`}, `${100 * share} %`))),
  ...(causal ? [html("span", {}, "future, not visible"), html("span", {class: "ramp hidden"})] : []));
  const all = () => { drawTiles(); drawThumbs(); };
  byId("tile-method").addEventListener("change", all);
  for (const id of ["tile-layer", "tile-head"]) byId(id).addEventListener("change", () => { drawTiles(); markThumb(); });
  build(byId("tile-viewer"), {pointermove: point, pointerdown: point, keydown: key, pointerleave: leave}, []);
  draw(all);
} else missing(byId("tile-viewer"), "No tile maps were recorded" + early);

// A canvas keeps its pixels, so it is painted again when the theme changes and for the printer.
for (const query of ["(prefers-color-scheme: dark)", "print"])
  matchMedia(query).addEventListener("change", () => redraws.at(-1)?.());
let width = document.body.clientWidth;
addEventListener("resize", () => {
  if (document.body.clientWidth === width) return;
  width = document.body.clientWidth;
  tip.hidden = true;
  for (const redraw of redraws) redraw();
});
})();
