// Models judged on the same text: the table, and quality against cache bytes.
function comparisonTable(c) {
  const depths = [...new Set(c.rows.flatMap((v) => v.decode_tok_s.map((d) => d[0])))].sort((a, b) => a - b);
  const any = (field) => c.rows.some((v) => known(v[field]));
  const between = (text, interval, format) => (interval ? el("span", { class: "score" }, text, small(interval.map(format).join("–"))) : text);
  const columns = [
    ["groups converted", c.rows.some((v) => v.total > 0), (v) => (v.total ? `${v.converted}/${v.total}` : DASH)],
    ["perplexity", any("ppl"), (v) => ppl(v.ppl)],
    ["perplexity / base", c.rows.some((v) => v.ppl_ratio), (v) => (v.ppl_ratio ? between(fixed(v.ppl_ratio.value, 3), v.ppl_ratio.interval, (x) => fixed(x, 3)) : DASH)],
    ["KL to base", any("kl"), (v) => between(fixed(v.kl, 4), v.kl_interval, (x) => fixed(x, 4))],
    ["top-1 agreement", any("top1_agreement"), (v) => between(percent(v.top1_agreement), v.top1_interval, (x) => fixed(100 * x, 1))],
    [`cache at ${count(c.context)}`, any("cache_bytes"), (v) => size(v.cache_bytes)],
    ["cache at 8k", any("cache_bytes_8k"), (v) => size(v.cache_bytes_8k)],
    ...depths.map((d) => [`tok/s at ${count(d)}`, true, (v) => rate((v.decode_tok_s.find((x) => x[0] === d) || [])[1])]),
  ].filter((column) => column[1]);
  const rows = c.rows.map((v) => [el("span", {}, v.name, v.description ? small(v.description) : null), ...columns.map((column) => column[2](v))]);
  return table(["model", ...columns.map((column) => column[0])], rows, { cards: true, label: c.title, rowClass: (i) => (isBase(c.rows[i]) ? "base" : null) });
}
const isBase = (v) => v.total > 0 && v.converted === 0;

function filesTable(c) {
  const names = [...new Set(c.rows.flatMap((v) => v.files.map((f) => f.name)))];
  if (names.length < 2) return null;
  const cell = (v, n) => { const f = v.files.find((x) => x.name === n); return f ? ppl(f.ppl) : DASH; };
  const rows = c.rows.filter((v) => v.files.length).map((v) => [v.name, ...names.map((n) => cell(v, n))]);
  return el("details", {}, el("summary", {}, "Perplexity by file"), table(["model", ...names], rows, { label: "Perplexity by file" }));
}

// Points by cache size, those of a series joined; the base is a guide where its value cannot stand on a logarithmic axis.
function tradeoff(c, { title, field, yName, text }) {
  const MIB = 1048576, cache = c.context ? "cache_bytes" : "cache_bytes_8k", tokens = count(c.context || 8192);
  const series = [...new Set(c.rows.map((v) => v.series || v.name))];
  const points = c.rows.map((v) => ({ name: v.name, x: v[cache] / MIB, y: v[field], index: series.indexOf(v.series || v.name), base: isBase(v), interval: field === "kl" ? v.kl_interval : null, ok: known(v[cache]) && known(v[field]) })).filter((p) => p.ok);
  const others = points.filter((p) => !p.base || p.y > 0);
  if (others.length < 2 || !points.some((p) => !p.base)) return null;
  const guides = points.filter((p) => p.base);
  const rows = points.map((p) => [p.name, size(p.x * MIB), text(p.y)]);
  const draw = (width) => {
    const height = 320, left = 58, right = width - 16, top = 34, bottom = height - 44;
    const max = Math.max(...points.map((p) => p.x)) * 1.06;
    const x = linearScale(0, max, left, right), y = yAxis(others.map((p) => p.y), { top, bottom, zero: false });
    const children = [axes({ left, right, top, bottom, y, yName, xTicks: linearTicks(max, Math.max(2, Math.floor(width / 90))), xName: `cache after ${tokens} tokens in f16, MiB`, x })];
    for (const g of guides) {
      children.push(svg("line", { class: "guide", x1: x(g.x), x2: x(g.x), y1: top, y2: bottom }));
      if (g.y > 0) children.push(svg("line", { class: "guide", x1: left, x2: right, y1: y.scale(g.y), y2: y.scale(g.y) }));
      const name = g.name.length > 24 ? `${g.name.slice(0, 23)}…` : g.name, before = x(g.x) > (left + right) / 2;
      children.push(svg("text", { class: "name label", x: x(g.x) + (before ? -6 : 6), y: top + 2, "text-anchor": before ? "end" : "start" }, `${name}: ${g.y > 0 ? text(g.y) : "0"}`));
    }
    const marks = [];
    const placed = others.map((p) => ({ ...p, px: x(p.x), py: y.scale(p.y) }));
    series.forEach((_, index) => {
      const line = placed.filter((p) => p.index === index).sort((a, b) => a.px - b.px);
      if (line.length > 1) children.push(svg("polyline", { class: "line faint", style: `stroke:${colour(index)}`, "stroke-dasharray": dashes(index), points: line.map((p) => `${p.px},${p.py}`).join(" ") }));
    });
    for (const p of placed) {
      if (!p.interval) continue;
      const [lo, hi] = p.interval.map((v) => (v > 0 || !y.log ? Math.min(Math.max(y.scale(v), top), bottom) : bottom));
      children.push(svg("path", { class: "whisker", style: `stroke:${colour(p.index)}`, d: `M${p.px},${lo}V${hi}` }));
    }
    if (width >= 400 && others.length <= MOST_LABELS) children.push(...labels(placed.filter((p) => !p.base), left, right, top, bottom));
    for (const p of placed) {
      const node = mark(svg("g", {}, shape(p.index, p.px, p.py, 5.5)), `${p.name}\n${yName} ${text(p.y)}${p.interval ? `, 95 % interval ${p.interval.map(text).join("–")}` : ""}\ncache ${size(p.x * MIB)}`, 0, marks.length);
      marks.push(node);
    }
    return { height, children: [...children, ...marks], marks, description: `${yName} of ${others.length} models against cache size; the lower left is best.` };
  };
  return chart({ title, legend: legend(series, false), table: table(["model", `cache at ${tokens}`, yName], rows, { label: title }), draw });
}

// Names beside their points, moved apart where they would overlap; more of them would hide the points.
const MOST_LABELS = 12;
function labels(points, left, right, top, bottom) {
  const GAP = 15, sides = { right: [], left: [] };
  for (const p of points) {
    const name = p.name.length > 24 ? `${p.name.slice(0, 23)}…` : p.name;
    const side = p.px + 12 + name.length * 6.6 > right ? "left" : "right";
    sides[side].push({ ...p, name, at: p.py });
  }
  const parts = [];
  for (const [side, list] of Object.entries(sides)) {
    list.sort((a, b) => a.at - b.at);
    for (let i = 1; i < list.length; i += 1) if (Math.abs(list[i].px - list[i - 1].px) < 150) list[i].at = Math.max(list[i].at, list[i - 1].at + GAP);
    for (let i = list.length - 1, floor = bottom - 4; i >= 0; i -= 1, floor -= GAP) list[i].at = Math.max(Math.min(list[i].at, floor), top);
    for (const p of list) {
      const sign = side === "right" ? 1 : -1;
      if (Math.abs(p.at - p.py) > 5) parts.push(svg("line", { class: "leader", x1: p.px + sign * 6, y1: p.py, x2: p.px + sign * 11, y2: p.at }));
      parts.push(svg("text", { class: "label", x: p.px + sign * 13, y: p.at + 4, "text-anchor": side === "right" ? "start" : "end" }, p.name));
    }
  }
  return [svg("g", { "aria-hidden": "true" }, parts)];
}

function qualitySection() {
  if (!data.comparisons.length) return;
  const s = section("quality", "Quality");
  const graphs = [];
  for (const c of data.comparisons) {
    s.append(el("article", {}, el("h3", {}, c.title), c.note ? el("p", { class: "dim" }, c.note) : null, comparisonTable(c), filesTable(c)));
    const of = data.comparisons.length > 1 ? `: ${c.title}` : "";
    graphs.push(tradeoff(c, { title: `KL to the base against cache${of}`, field: "kl", yName: "KL, nats per token", text: (v) => fixed(v, 4) }),
      tradeoff(c, { title: `Perplexity against cache${of}`, field: "ppl", yName: "perplexity", text: ppl }));
  }
  const drawn = graphs.filter(Boolean);
  if (!drawn.length) return;
  section("tradeoff", "Quality against cache", "Further left is a smaller cache, lower is better. Dashed lines are the base.").append(el("div", { class: "grid" }, drawn));
}
