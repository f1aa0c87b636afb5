// Elements, numbers, tables and tooltips. Values reach the page as text and attributes only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const DASH = "–";

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs)) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return node;
}
const el = (tag, attrs = {}, ...children) => fill(document.createElement(tag), attrs, children);
const svg = (tag, attrs = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, children);

const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
const count = (n) => (known(n) ? Math.round(n).toLocaleString("en-US") : DASH);
const fixed = (x, digits) => (known(x) ? x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : DASH);
const percent = (x, digits = 1) => (known(x) ? `${fixed(100 * x, digits)} %` : DASH);
// About four significant digits.
function fmt(x) {
  if (!known(x)) return DASH;
  const a = Math.abs(x);
  if (a !== 0 && (a >= 1e7 || a < 1e-3)) return x.toExponential(2).replace("e", "·10^").replace("^+", "^");
  return Number.isInteger(x) ? count(x) : fixed(x, a >= 1000 ? 0 : a >= 100 ? 1 : a >= 10 ? 2 : a >= 1 ? 3 : 4);
}
const ppl = (x) => (known(x) ? fixed(x, x >= 1000 ? 0 : 2) : DASH);
const rate = (x) => (known(x) ? fixed(x, x >= 1000 ? 0 : 1) : DASH);
function size(n) {
  if (!known(n)) return DASH;
  let unit = 0;
  while (n >= 1024 && unit < 4) { n /= 1024; unit += 1; }
  return `${unit ? fixed(n, 1) : n} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

// More columns than this and a sheet of paper needs small type.
const WIDE = 9;
// A table; cells are text or nodes, the first of each row is its head.
function table(columns, rows, options = {}) {
  const head = el("thead", {}, el("tr", {}, columns.map((c, i) => el("th", { scope: "col", class: options.text && options.text.includes(i) ? "text" : null }, c))));
  const cells = (row) => row.map((c, i) => i === 0 ? el("th", { scope: "row" }, c)
    : el("td", { "data-label": columns[i], class: options.text && options.text.includes(i) ? "text wrap" : null }, c));
  const body = el("tbody", {}, rows.map((row, i) => el("tr", { class: options.rowClass ? options.rowClass(i) : null }, cells(row))));
  const classes = [options.cards && "cards", columns.length > WIDE && "wide"].filter(Boolean).join(" ");
  const made = el("table", { class: classes || null }, options.caption ? el("caption", {}, options.caption) : null, head, body);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label || options.caption || "table" }, made);
}
const small = (text) => el("span", { class: "dim" }, text);

const sections = [];
function section(id, title, note) {
  const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), note ? el("p", { class: "dim" }, note) : null);
  sections.push([id, title]);
  page.append(node);
  return node;
}

// One tooltip for every mark, by pointer and by keyboard focus; Escape hides it.
const tip = el("div", { id: "tip", role: "tooltip", hidden: true });
let tipped = null;
function hideTip() {
  tipped = null;
  tip.hidden = true;
}
function placeTip() {
  const at = tipped.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left + at.width / 2 - box.width / 2, 6), document.documentElement.clientWidth - box.width - 6);
  tip.style.left = `${left}px`;
  tip.style.top = `${at.top - box.height - 8 >= 4 ? at.top - box.height - 8 : at.bottom + 8}px`;
}
function showTip(event) {
  const mark = event.target instanceof Element ? event.target.closest(".mark") : null;
  if (!mark) { hideTip(); return; }
  tipped = mark;
  tip.textContent = mark.tipText;
  tip.hidden = false;
  placeTip();
}
document.addEventListener("pointerover", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("focusout", hideTip);
// Focus scrolls its mark into view; the tooltip follows.
document.addEventListener("scroll", () => { if (tipped && tipped === document.activeElement) placeTip(); else hideTip(); }, { passive: true, capture: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
