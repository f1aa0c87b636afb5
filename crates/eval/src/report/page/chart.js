// What all charts share: a figure that is drawn anew for its width, marks that the keyboard reaches, axes, legends, a table of the same values.
let charts = 0;
const PRINT_WIDTH = 330, PRINT_WIDE = 680;

// `draw(width)` gives the children of the svg, its height and its marks; `table` the same values as a node.
function chart({ title, desc, legend, table: values, draw, wide = false }) {
  charts += 1;
  const id = `chart${charts}`;
  const plot = el("div", { class: "plot" });
  const node = el("figure", {}, title ? el("h3", { id: `${id}-h` }, title) : null, plot, legend || null,
    values ? el("details", {}, el("summary", {}, "Values as a table"), values) : null);
  let drawn = 0;
  const render = (width) => {
    const wanted = Math.max(Math.floor(width), 240);
    if (wanted === drawn) return;
    drawn = wanted;
    const { height, children, marks, description } = draw(wanted);
    const root = svg("svg", { width: wanted, height, viewBox: `0 0 ${wanted} ${height}`, role: "group", "aria-roledescription": "chart", "aria-labelledby": `${id}-t`, "aria-describedby": `${id}-d` },
      svg("title", { id: `${id}-t` }, title || desc), svg("desc", { id: `${id}-d` }, `${description || desc || ""} Arrow keys move between the values.`), children);
    keyboard(root, marks || []);
    plot.replaceChildren(root);
  };
  node.redraw = () => { const width = drawn; drawn = 0; if (width) render(width); };
  new ResizeObserver((entries) => { if (entries[0].contentRect.width > 0) render(entries[0].contentRect.width); }).observe(plot);
  window.addEventListener("beforeprint", () => render(wide ? PRINT_WIDE : PRINT_WIDTH));
  window.addEventListener("afterprint", () => render(plot.getBoundingClientRect().width));
  return node;
}

// Makes a node a value that can be pointed at and focused; row and column say where the arrow keys find it.
function mark(node, text, row, column, choose) {
  fill(node, { role: choose ? "button" : "img", tabindex: "-1", "aria-label": text.replace(/\n/g, ", ") }, []);
  node.classList.add("mark");
  node.tipText = text;
  node.place = [row, column];
  if (choose) {
    node.addEventListener("click", choose);
    node.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { choose(); event.preventDefault(); } });
  }
  return node;
}

// One stop for Tab in each chart; arrows go to the nearest mark of the next column or row, left and right beyond the end of a row to the next mark in order.
function keyboard(root, marks) {
  if (!marks.length) return;
  marks[0].setAttribute("tabindex", "0");
  const focus = (to) => {
    marks.forEach((m) => m.setAttribute("tabindex", m === to ? "0" : "-1"));
    to.focus();
  };
  root.addEventListener("keydown", (event) => {
    const from = marks.find((m) => m === document.activeElement);
    if (!from) return;
    const [row, column] = from.place;
    const nearest = (ahead, key, other) => marks.filter((m) => ahead(m.place)).sort((a, b) => Math.abs(a.place[key] - from.place[key]) - Math.abs(b.place[key] - from.place[key])
      || Math.abs(a.place[other] - from.place[other]) - Math.abs(b.place[other] - from.place[other]))[0];
    const to = {
      ArrowRight: () => nearest((p) => p[0] === row && p[1] > column, 1, 0) ?? marks[marks.indexOf(from) + 1],
      ArrowLeft: () => nearest((p) => p[0] === row && p[1] < column, 1, 0) ?? marks[marks.indexOf(from) - 1],
      ArrowDown: () => nearest((p) => p[0] > row, 0, 1), ArrowUp: () => nearest((p) => p[0] < row, 0, 1), Home: () => marks[0], End: () => marks[marks.length - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (next) focus(next);
  });
}

// Round values that span a range: 1, 2, 5 times powers of ten, with zero when the axis is linear.
function linearTicks(high, wanted) {
  const raw = high / Math.max(wanted, 1), power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
}
function logTicks(low, high, wanted) {
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) for (const m of steps) ticks.push(m * 10 ** e);
    const inside = ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
    if (inside.length <= wanted && inside.length >= 2) return inside;
    if (steps.length === 1) return inside.filter((_, i) => i % Math.ceil(inside.length / wanted) === 0);
  }
}
const logScale = (low, high, from, to) => (v) => from + (to - from) * (high > low ? Math.log(v / low) / Math.log(high / low) : 0.5);
const linearScale = (low, high, from, to) => (v) => from + (to - from) * (high > low ? (v - low) / (high - low) : 0.5);

// A y axis for values: logarithmic when they span much and are positive. `zero` starts a linear one at 0.
function yAxis(values, { top, bottom, log, zero = true, format = fmt }) {
  const finite = values.filter(known), high = Math.max(...finite), low = Math.min(...finite);
  if (log ?? (low > 0 && high / low > 20)) {
    const [a, b] = [low / 1.5, high * 1.4];
    return { scale: logScale(a, b, bottom, top), ticks: logTicks(a, b, 7), format, log: true };
  }
  const start = zero ? Math.min(low, 0) : low - (high - low) * 0.08 - 1e-12, end = high + (high - start) * 0.06 || 1;
  const ticks = zero ? linearTicks(end, 5) : linearTicks(end - start, 4).map((t) => t + Math.ceil(start / stepOf(end - start, 4)) * stepOf(end - start, 4)).filter((t) => t >= start && t <= end);
  return { scale: linearScale(start, end, bottom, top), ticks, format, log: false };
}
function stepOf(span, wanted) { const t = linearTicks(span, wanted); return t.length > 1 ? t[1] : span; }
// Ticks with as many decimals as their step needs.
const tickText = (axis) => (t) => axis.log ? (t >= 1 ? count(t) : String(Number(t.toPrecision(2)))) : (() => {
  const step = axis.ticks.length > 1 ? axis.ticks[1] - axis.ticks[0] : 1, digits = Math.min(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), 6);
  return fixed(t, digits);
})();

// Grid lines and labels of both axes.
function axes({ left, right, top, bottom, y, yName, xTicks, xName, xText = count, x }) {
  const text = y.text || tickText(y), parts = [];
  for (const t of y.ticks) parts.push(svg("line", { class: "gridline", x1: left, x2: right, y1: y.scale(t), y2: y.scale(t) }), svg("text", { class: "tick", x: left - 7, y: y.scale(t) + 4, "text-anchor": "end" }, text(t)));
  let free = -Infinity;
  for (const t of xTicks) {
    const at = x(t), label = xText(t), half = label.length * 3.4;
    parts.push(svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at - half < free) continue;
    free = at + half + 6;
    parts.push(svg("text", { class: "tick", x: at, y: bottom + 17, "text-anchor": "middle" }, label));
  }
  parts.push(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }), svg("text", { class: "name", x: (left + right) / 2, y: bottom + 35, "text-anchor": "middle" }, xName),
    svg("text", { class: "name", x: left - 7, y: top - 12, "text-anchor": "start", dx: 7 - Math.min(left - 4, 44) }, yName + (y.log ? " (logarithmic)" : "")));
  return svg("g", { "aria-hidden": "true" }, parts);
}

// Series differ by colour, shape and dashes.
const colour = (i) => `var(--s${i % 8})`;
const DASHES = ["", "7 4", "2 4", "9 3 2 3"];
const dashes = (i) => DASHES[Math.floor(i / 8) % 4] || null;
function shape(i, x, y, r) {
  const path = [null, `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`, `M0,${-1.25 * r}L${1.2 * r},${r}H${-1.2 * r}z`, `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0z`, `M0,${1.25 * r}L${1.2 * r},${-r}H${-1.2 * r}z`][i % 5];
  const at = { transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, class: "dot", style: `fill:${colour(i)}` };
  return path ? svg("path", { ...at, d: path }) : svg("circle", { ...at, r });
}
function legend(names, lines = true) {
  const width = lines ? 26 : 14;
  return el("ul", { class: "legend" }, names.map((name, i) => el("li", {}, svg("svg", { width, height: 14, "aria-hidden": "true" },
    lines ? svg("line", { class: "line", x1: 1, x2: 25, y1: 7, y2: 7, style: `stroke:${colour(i)}`, "stroke-dasharray": dashes(i) }) : null, shape(i, width / 2, 7, lines ? 4 : 5)), name)));
}
