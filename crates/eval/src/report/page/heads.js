// Head maps: layers across, heads down, a chosen statistic as lightness, the chosen plan as outlines.
const STATISTICS = {
  recency_ratio_16: "Recency ratio, last 16 tokens", recency_ratio_64: "Recency ratio, last 64 tokens", recency_ratio_128: "Recency ratio, last 128 tokens", sink_mass: "Attention on the sinks",
  mean_distance: "Mean distance, tokens", entropy: "Entropy, nats", prev_token_mass: "Attention on the previous token",
};
const MAX_THUMBS = 20000;

// Light to dark (dark to light in the dark theme) by mixing the theme's own colours.
function shade(f) {
  const p = Math.min(Math.max(f, 0), 1), [a, b, q] = p < 0.5 ? ["--ramp0", "--ramp1", 2 * p] : ["--ramp1", "--ramp2", 2 * p - 1];
  return `color-mix(in oklab, var(${b}) ${(100 * q).toFixed(1)}%, var(${a}))`;
}

// Choices of a map: name, values [layer][row], and rows that one value spans.
function choices(map) {
  const per = map.model.heads / map.model.kv_heads, list = [];
  if (map.heads) {
    for (const [key, name] of Object.entries(STATISTICS)) list.push({ key, name, span: 1, values: map.heads.layers.map((l) => l.heads.map((h) => h[key])) });
    for (const c of Object.keys(map.heads.layers[0].groups[0].scores)) list.push({ key: c, name: `Score: ${c}`, span: per, values: map.heads.layers.map((l) => l.groups.map((g) => g.scores[c])) });
  }
  for (const [name, plan] of map.plans) {
    if (plan.layers.some((l) => l.groups.some((g) => known(g.score)))) list.push({ key: `plan ${name}`, name: `Score in ${name}`, span: per, values: plan.layers.map((l) => l.groups.map((g) => g.score ?? null)) });
  }
  if (!list.length) list.push({ key: "none", name: "Converted groups", span: per, values: map.plans[0][1].layers.map((l) => l.groups.map(() => null)) });
  return list;
}
function range(choice) {
  const flat = choice.values.flat().filter(known);
  return flat.length ? [Math.min(...flat), Math.max(...flat)] : [0, 1];
}

function mapCells(map, choice, plan, { left, top, cw, ch, gap }, make) {
  const per = map.model.heads / map.model.kv_heads, [lo, hi] = range(choice), cells = [], outlines = [];
  const y = (head) => top + head * ch + Math.floor(head / per) * gap;
  choice.values.forEach((rows, layer) => rows.forEach((v, i) => {
    const attrs = { x: (left + layer * cw).toFixed(2), y: y(i * choice.span).toFixed(2), width: (cw - Math.min(1, cw * 0.12)).toFixed(2), height: (choice.span * ch - Math.min(1, ch * 0.12)).toFixed(2),
      style: `fill:${known(v) ? shade((v - lo) / (hi - lo || 1)) : "var(--card)"}` };
    cells.push(make(attrs, layer, i, v));
  }));
  if (plan) plan.layers.forEach((l, layer) => l.groups.forEach((g, k) => {
    if (g.mixer === "recurrent") outlines.push(svg("rect", { class: "converted", x: (left + layer * cw + 0.4).toFixed(2), y: (y(k * per) - 0.8).toFixed(2), width: Math.max(cw - 1.8, 1).toFixed(2), height: (per * ch + 0.6).toFixed(2), rx: 1 }));
  }));
  return { cells, outlines, bottom: y(map.model.heads - 1) + ch };
}

function thumbnail(map, choice) {
  const { cells, bottom } = mapCells(map, choice, null, { left: 0, top: 1, cw: 4, ch: 3, gap: 1 }, (attrs) => svg("rect", attrs));
  return svg("svg", { viewBox: `0 0 ${map.model.layers * 4} ${bottom + 1}`, "aria-hidden": "true" }, cells);
}

function headMap(map) {
  const list = choices(map), per = map.model.heads / map.model.kv_heads;
  const state = { choice: list.find((c) => c.key === "recency_ratio_64") || list[0], plan: map.plans.length ? 0 : -1, layer: 0, head: 0 };
  const plan = () => (state.plan >= 0 ? map.plans[state.plan][1] : null);
  const detail = el("div", { "aria-live": "polite" });
  const key = el("div", { class: "key" }), holder = el("div"), thumbs = el("div", { class: "thumbs" }), values = el("div");

  const draw = (width) => {
    const left = 44, right = width - 4, top = 22, layers = map.model.layers, heads = map.model.heads;
    const cw = (right - left) / layers, ch = Math.max(7, Math.min(20, 420 / heads)), gap = per > 1 ? 3 : 0;
    const marks = [];
    const make = (attrs, layer, i, v) => {
      const last = i * state.choice.span + state.choice.span - 1, what = state.choice.span > 1 ? `group ${i} (heads ${i * state.choice.span} to ${last})` : `head ${i}`;
      const group = Math.floor((i * state.choice.span) / per), converted = plan() ? (plan().layers[layer].groups[group].mixer === "recurrent" ? "\nconverted" : "\nkept") : "";
      const cell = mark(svg("rect", { ...attrs, class: "cell" }), `layer ${layer}, ${what}\n${state.choice.name}: ${fmt(v)}${converted}`, i, layer, () => choose(layer, i * state.choice.span, cell));
      if (layer === state.layer && i === Math.floor(state.head / state.choice.span)) cell.classList.add("chosen");
      marks.push(cell);
      return cell;
    };
    const { cells, outlines, bottom } = mapCells(map, state.choice, plan(), { left, top, cw, ch, gap }, make);
    const every = Math.max(1, Math.ceil(26 / cw)), step = every > 2 ? Math.ceil(every / 5) * 5 : every, words = [];
    for (let l = 0; l < layers; l += step) words.push(svg("text", { class: "tick", x: left + (l + 0.5) * cw, y: top - 6, "text-anchor": "middle" }, String(l)));
    const rowStep = ch >= 12 ? 1 : per > 1 && per * ch >= 12 ? per : Math.ceil(12 / ch);
    for (let h = 0; h < heads; h += rowStep) words.push(svg("text", { class: "tick", x: left - 7, y: top + (h + 0.5) * ch + Math.floor(h / per) * gap + 4, "text-anchor": "end" }, String(h)));
    words.push(svg("text", { class: "name", x: (left + right) / 2, y: bottom + 18, "text-anchor": "middle" }, "layer"),
      svg("text", { class: "name", transform: `translate(11,${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "head"));
    return { height: bottom + 24, children: [svg("g", { "aria-hidden": "true" }, words), cells, outlines], marks, description: `${state.choice.name} by layer and head.` };
  };
  const figure = chart({ desc: `Head map of ${map.title}`, draw, wide: true });

  function choose(layer, head, cell) {
    [state.layer, state.head] = [layer, head];
    figure.querySelectorAll(".chosen").forEach((c) => c.classList.remove("chosen"));
    if (cell) cell.classList.add("chosen");
    showDetail();
  }

  function showDetail() {
    if (!map.heads) return;
    const h = map.heads.layers[state.layer].heads[state.head], mass = h.mass_by_distance;
    const label = (b) => (b <= 1 ? String(b) : b === 2 ? "2–3" : `${count(2 ** (b - 1))}–${count(2 ** b - 1)}`), short = (b) => (b <= 1 ? String(b) : 2 ** (b - 1) >= 1024 ? `${2 ** (b - 11)}k` : String(2 ** (b - 1)));
    const bars = barChart({ title: `Layer ${state.layer}, head ${state.head}: attention by distance`, desc: "Share of the live attention by distance in tokens.", xName: "distance, tokens (from)", yName: "share, %",
      bars: mass.map((v, b) => ({ label: label(b), short: short(b), value: 100 * v, text: percent(v) })) });
    const facts = el("dl", {}, Object.entries(STATISTICS).map(([k, name]) => [el("dt", {}, name), el("dd", {}, k === "mean_distance" ? fixed(h[k], 1) : fixed(h[k], 4))]));
    detail.replaceChildren(bars, facts, h.no_op ? el("p", { class: "dim" }, "Almost all of its attention is on the sinks: its ratios describe little.") : "");
  }

  function refresh() {
    const [lo, hi] = range(state.choice);
    key.replaceChildren(fmt(lo), el("span", { class: "ramp", "aria-hidden": "true" }), fmt(hi), ...(plan() ? [el("span", { class: "swatch", "aria-hidden": "true" }), `converted: ${plan().layers.flatMap((l) => l.groups).filter((g) => g.mixer === "recurrent").length} of ${map.model.layers * map.model.kv_heads} groups`] : []));
    const columns = ["layer", ...state.choice.values[0].map((_, i) => `${state.choice.span > 1 ? "group" : "head"} ${i}`)];
    values.replaceChildren(table(columns, state.choice.values.map((row, l) => [String(l), ...row.map((v) => fmt(v))]), { label: state.choice.name }));
    thumbs.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(list[i] === state.choice)));
    statistic.value = String(list.indexOf(state.choice));
    figure.redraw();
  }

  const option = (text, value) => el("option", { value: String(value) }, text);
  const statistic = el("select", {}, list.map((c, i) => option(c.name, i)));
  statistic.addEventListener("change", () => { state.choice = list[Number(statistic.value)]; refresh(); });
  const plans = el("select", {}, option("none", -1), map.plans.map(([name, p], i) => option(`${name} (β ${p.beta})`, i)));
  plans.value = String(state.plan);
  plans.addEventListener("change", () => { state.plan = Number(plans.value); refresh(); });
  function drawThumbs() {
    if (list.length < 2 || list.length * map.model.layers * map.model.heads > MAX_THUMBS) return;
    thumbs.replaceChildren(...list.map((c) => {
      const button = el("button", { type: "button", "aria-pressed": "false" }, c.name, thumbnail(map, c));
      button.addEventListener("click", () => { state.choice = c; refresh(); });
      return button;
    }));
  }
  drawThumbs();
  holder.append(el("div", { class: "controls" }, el("label", {}, "Statistic", statistic), map.plans.length ? el("label", {}, "Plan", plans) : null), figure, key,
    el("details", {}, el("summary", {}, "Values as a table"), values));
  const below = el("div", { class: "grid" }, detail);
  if (map.heads) below.append(histogram(map));
  refresh();
  showDetail();
  return el("article", {}, el("h3", {}, map.title), holder, map.heads ? below : null, thumbs);
}

function barChart({ title, desc, xName, yName, bars }) {
  const draw = (width) => {
    const height = 230, left = 46, right = width - 6, top = 30, bottom = height - 44, slot = (right - left) / Math.max(bars.length, 1), marks = [];
    const high = Math.max(...bars.map((b) => b.value), 1e-9), y = { scale: linearScale(0, high * 1.05, bottom, top), ticks: linearTicks(high * 1.05, 4), log: false };
    const x = (i) => left + (i + 0.5) * slot;
    bars.forEach((b, i) => marks.push(mark(svg("g", {}, svg("rect", { x: left + i * slot, y: top, width: slot, height: bottom - top, fill: "transparent" }),
      svg("rect", { class: "bar dot", x: left + i * slot + 1.5, y: y.scale(b.value), width: Math.max(slot - 3, 1), height: bottom - y.scale(b.value) })), `${b.label}: ${b.text}`, 0, i)));
    return { height, children: [axes({ left, right, top, bottom, y, yName, xTicks: bars.map((_, i) => i), xName, x, xText: (i) => bars[i].short }), marks], marks, description: desc };
  };
  return chart({ title, draw, table: table([xName, yName], bars.map((b) => [b.label, b.text]), { label: title }) });
}

function histogram(map) {
  const n = 10, counts = new Array(n).fill(0), values = map.heads.layers.flatMap((l) => l.heads.map((h) => h.recency_ratio_64));
  for (const v of values) counts[Math.min(n - 1, Math.max(0, Math.floor(v * n)))] += 1;
  return barChart({ title: "How many heads look how near: recency ratio of the last 64 tokens", desc: "Number of heads by recency ratio.", xName: "recency ratio (from)", yName: "heads",
    bars: counts.map((c, i) => ({ label: `${(i / n).toFixed(1)}–${((i + 1) / n).toFixed(1)}`, short: (i / n).toFixed(1), value: c, text: `${c} of ${values.length} heads` })) });
}

function headsSection() {
  if (!data.maps.length) return;
  const measured = data.maps.find((m) => m.heads);
  const s = section("heads", "Heads", (measured ? `Measured on ${count(measured.heads.tokens)} tokens in sequences of ${count(measured.heads.context)}. ` : "") +
    "Rows are query heads, gaps part KV groups. " + (measured ? "Choose a cell (mouse, or Tab, arrows and Enter) to see where that head looks." : ""));
  data.maps.forEach((m) => s.append(headMap(m)));
}
