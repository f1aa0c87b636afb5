// Lines: learning curves, speed and cache against depth.
const FOCUSABLE = 40, SMOOTH_FROM = 60;

// A moving median over a fortieth of the points on each side: single spikes do not bend it.
function smooth(points) {
  const reach = Math.ceil(points.length / 40);
  return points.map(([x], i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1).map((p) => p[1]).sort((a, b) => a - b);
    return [x, (near[Math.floor((near.length - 1) / 2)] + near[Math.ceil((near.length - 1) / 2)]) / 2];
  });
}

function lineChart({ title, desc, xName, yName, series, xLog, yLog, zero, yText = fmt, yTick }) {
  const lines = series.map((s) => ({ name: s.name, points: s.points.filter((p) => known(p[0]) && known(p[1])) })).map((s, i) => ({ ...s, index: i }));
  const all = lines.flatMap((s) => s.points);
  if (!all.length) return null;
  const rows = lines.flatMap((s) => s.points.map((p) => [s.name, count(p[0]), yText(p[1])]));
  const shown = rows.length > 400 ? rows.filter((_, i) => i % Math.ceil(rows.length / 400) === 0) : rows;
  const draw = (width) => {
    const height = 290, left = 58, right = width - 14, top = 30, bottom = height - 44;
    const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b), [low, high] = [xs[0], xs[xs.length - 1]];
    const x = xLog ? logScale(low, high, left + 8, right - 8) : linearScale(0, high, left, right - 4);
    const y = yAxis(all.map((p) => p[1]), { top, bottom, log: yLog, zero });
    if (yTick) y.text = yTick;
    const xTicks = xLog ? (xs.length <= 9 ? xs : logTicks(low, high, 7)) : linearTicks(high, Math.max(2, Math.floor(width / 110)));
    const children = [axes({ left, right, top, bottom, y, yName, xTicks, xName, x })], marks = [];
    for (const { name, points, index } of lines) {
      const path = (list) => list.map((p) => `${x(p[0]).toFixed(1)},${y.scale(p[1]).toFixed(1)}`).join(" ");
      const dense = points.length > SMOOTH_FROM;
      if (dense) children.push(svg("polyline", { class: "line faint", points: path(points), style: `stroke:${colour(index)}` }));
      children.push(svg("polyline", { class: "line", points: path(dense ? smooth(points) : points), style: `stroke:${colour(index)}`, "stroke-dasharray": dashes(index) }));
      const every = Math.ceil(points.length / FOCUSABLE);
      points.forEach((p, i) => {
        if (i % every !== 0 && i !== points.length - 1) return;
        const dot = shape(index, x(p[0]), y.scale(p[1]), 4.2);
        if (points.length > FOCUSABLE) dot.classList.add("ghost");
        const node = mark(svg("g", {}, svg("circle", { cx: x(p[0]), cy: y.scale(p[1]), r: 9, fill: "transparent" }), dot), `${name}\n${count(p[0])} tokens: ${yText(p[1])}`, index, p[0]);
        children.push(node);
        marks.push(node);
      });
    }
    return { height, children, marks, description: `${desc} ${lines.length} ${lines.length === 1 ? "line" : "lines"}: ${lines.map((s) => s.name).join(", ")}.` };
  };
  return chart({ title, legend: legend(lines.map((s) => s.name)), table: table(["series", "tokens", yName], shown, { label: title }), draw });
}

function curvesSection() {
  if (!data.curves.length) return;
  const s = section("learning", "Learning curves", "Thin lines are single steps, thick ones a moving median where there are many.");
  const groups = new Map();
  for (const c of data.curves) groups.set(c.y_label, [...(groups.get(c.y_label) || []), c]);
  const grid = el("div", { class: "grid" });
  for (const [label, curves] of groups) {
    const mean = Math.max(...curves.map((c) => c.steps_per_point));
    const node = lineChart({ title: label.charAt(0).toUpperCase() + label.slice(1), desc: `${label} against tokens.`, xName: mean > 1 ? `tokens (points are means of up to ${count(mean)} steps)` : "tokens",
      yName: label.includes("KL") ? "nats" : label.split(": ").pop(), series: curves, zero: false });
    if (node) grid.append(node);
  }
  s.append(grid);
}

function speedSection() {
  const filled = data.speeds.filter((t) => t.series.some((x) => x.points.length));
  if (!filled.length) return;
  const s = section("speed", "Speed and cache against depth", "Depth is the number of tokens in the cache. Only lines of one chart were measured under the same conditions.");
  for (const t of filled) {
    const pick = (field, unit = 1) => t.series.map((x) => ({ name: x.name, points: x.points.map((p) => [p.depth, known(p[field]) ? p[field] / unit : null]) }));
    const grid = el("div", { class: "grid" });
    const add = (field, options) => {
      // Keep every series, so that colours are the same in all charts, unless none has this value.
      if (!t.series.some((x) => x.points.some((p) => known(p[field])))) return;
      const node = lineChart({ xName: "depth, tokens", xLog: true, series: pick(field, options.unit), ...options });
      if (node) grid.append(node);
    };
    add("decode_tok_s", { title: "Decoding, tokens per second", desc: "Decode speed against depth.", yName: "tokens/s", yText: (v) => `${rate(v)} tok/s`, yLog: false });
    add("prefill_tok_s", { title: "Prefill, tokens per second", desc: "Prefill speed against depth.", yName: "tokens/s", yText: (v) => `${rate(v)} tok/s`, yLog: false });
    if (t.series.some((x) => x.points.filter((p) => known(p.cache_bytes)).length > 1)) {
      add("cache_bytes", { title: "Cache size", desc: "Cache bytes against depth.", yName: "MiB", unit: 1048576, yText: (v) => size(v * 1048576) });
    }
    s.append(el("article", {}, el("h3", {}, t.title), grid));
  }
}
