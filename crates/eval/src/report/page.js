"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const SVG = "http://www.w3.org/2000/svg";
  const el = (tag, attrs = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
    node.append(...children.filter((c) => c !== null && c !== undefined));
    return node;
  };
  const svg = (tag, attrs = {}, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const fmt = (x) => {
    if (x === null || x === undefined) return "–";
    if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x);
    const a = Math.abs(x);
    if (a !== 0 && (a >= 1e6 || a < 1e-3)) return x.toExponential(2);
    return a >= 1000 ? x.toFixed(0) : a >= 100 ? x.toFixed(1) : a >= 10 ? x.toFixed(2) : x.toFixed(3);
  };
  const size = (n) => {
    if (n === null || n === undefined) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let u = 0;
    while (n >= 1024 && u < 4) { n /= 1024; u += 1; }
    return `${u ? n.toFixed(1) : n} ${units[u]}`;
  };
  const colour = (f) => {
    // Dark blue to yellow, even in lightness, readable in both themes.
    const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
    const p = Math.min(Math.max(f, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(p), stops.length - 2);
    const c = stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (p - i)));
    return `rgb(${c.join(",")})`;
  };
  const section = (title, note) => {
    const s = el("section", {}, el("h2", {}, title));
    if (note) s.append(el("p", { class: "dim" }, note));
    page.append(s);
    return s;
  };

  page.replaceChildren(el("h1", {}, data.title));
  if (data.summary) page.append(el("p", {}, data.summary));

  // Comparison -------------------------------------------------------------------------------------------------------------
  if (data.variants.length) {
    const s = section("Comparison", "Perplexity is the geometric mean over the held-out files; KL is to the base model, nats per token.");
    const depths = data.variants[0].decode_tok_s.map((d) => d[0]);
    const head = ["model", "converted", "perplexity", "KL", "top-1 agreement", "cache at 8k", ...depths.map((d) => `decode at ${d}, tok/s`)];
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))));
    const body = el("tbody");
    for (const v of data.variants) {
      const name = el("td", {}, v.name, el("span", { class: "dim" }, v.description));
      const cells = [`${v.converted}/${v.total}`, fmt(v.ppl), fmt(v.kl), v.top1_agreement === null ? "–" : `${(100 * v.top1_agreement).toFixed(1)} %`, size(v.cache_bytes_8k),
        ...depths.map((d) => fmt((v.decode_tok_s.find((x) => x[0] === d) || [])[1]))];
      body.append(el("tr", {}, name, ...cells.map((c) => el("td", {}, c))));
    }
    table.append(body);
    s.append(el("div", { class: "scroll" }, table));
    const bars = el("div", { class: "columns" });
    bars.append(ranking("KL to the base, nats per token (logarithmic)", data.variants.slice(1), (v) => v.kl, true));
    bars.append(ranking("Cache at 8192 tokens, MiB", data.variants, (v) => v.cache_bytes_8k && v.cache_bytes_8k / 1048576, false));
    s.append(bars);
  }

  function ranking(title, variants, value, logarithmic) {
    const rows = variants.map((v) => [v.name, value(v)]).filter((r) => r[1] !== null && Number.isFinite(r[1]));
    const w = 480, rh = 24, left = 120, floor = 1e-3;
    const scale = (x) => (logarithmic ? Math.log10(Math.max(x, floor) / floor) : Math.max(x, 0));
    const top = Math.max(...rows.map((r) => scale(r[1])), 1e-9);
    const root = svg("svg", { viewBox: `0 0 ${w} ${rows.length * rh + 4}`, width: w, role: "img", "aria-label": title });
    rows.forEach(([name, x], i) => {
      const length = Math.max((scale(x) / top) * (w - left - 70), 1);
      root.append(svg("text", { x: left - 8, y: i * rh + 16, "text-anchor": "end" }, name),
        svg("rect", { x: left, y: i * rh + 4, width: length, height: rh - 8, fill: name.includes("ours") ? "var(--accent2)" : "var(--accent)" }),
        svg("text", { x: left + length + 6, y: i * rh + 16 }, fmt(x)));
    });
    return el("figure", {}, el("h3", {}, title), root);
  }

  // Heads ------------------------------------------------------------------------------------------------------------------
  if (data.heads) {
    const heads = data.heads, plan = data.plan;
    const perGroup = heads.model.heads / heads.model.kv_heads;
    const s = section("Heads", `${heads.tokens} tokens in sequences of ${heads.context}; rows are layers, columns are query heads. ` +
      (plan ? "Outlined groups are converted. " : "") + "Choose a cell (mouse, or Tab and Enter) to see where that head looks.");
    const maps = el("div", { class: "maps" });
    const detail = el("div", { class: "detail", "aria-live": "polite" });
    const stats = ["recency_ratio_16", "recency_ratio_64", "recency_ratio_128", "sink_mass", "mean_distance", "entropy", "prev_token_mass"];
    for (const stat of stats) maps.append(heatmap(stat, heads.layers.map((l) => l.heads.map((x) => x[stat])), 1));
    const criteria = Object.keys(heads.layers[0].groups[0].scores || {});
    for (const c of criteria) maps.append(heatmap(`score: ${c}`, heads.layers.map((l) => l.groups.map((g) => g.scores[c])), perGroup));
    s.append(maps, detail);
    show(0, 0);
    const hist = section("Distribution of recency_ratio_64", "Share of each head's live attention within the last 64 tokens, all heads.");
    hist.append(histogram(heads.layers.flatMap((l) => l.heads.map((x) => x.recency_ratio_64))));

    function heatmap(title, rows, span) {
      const flat = rows.flat().filter((v) => Number.isFinite(v));
      const lo = Math.min(...flat), hi = Math.max(...flat);
      const cw = Math.max(6, Math.floor(220 / (rows[0].length * span))) * span, ch = 9;
      const w = 24 + rows[0].length * cw, h = rows.length * ch + 4;
      const root = svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, role: "img", "aria-label": `${title}, ${rows.length} layers` });
      rows.forEach((row, l) => {
        if (l % 5 === 0) root.append(svg("text", { x: 20, y: l * ch + 9, "text-anchor": "end" }, String(l)));
        row.forEach((v, i) => {
          const cell = svg("rect", { x: 24 + i * cw, y: l * ch + 1, width: cw - 0.5, height: ch - 0.5, class: "cell", fill: colour((v - lo) / (hi - lo || 1)), tabindex: i === 0 && l === 0 ? 0 : -1 });
          cell.append(svg("title", {}, `layer ${l}, ${span > 1 ? "group" : "head"} ${i}: ${fmt(v)}`));
          cell.addEventListener("click", () => show(l, i * span));
          cell.addEventListener("keydown", (e) => {
            const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row.length, ArrowUp: -row.length }[e.key];
            const cells = [...root.querySelectorAll(".cell")];
            const next = cells[cells.indexOf(cell) + (step || 0)];
            if (e.key === "Enter") show(l, i * span);
            else if (step && next) { next.focus(); e.preventDefault(); }
          });
          root.append(cell);
        });
        if (plan) plan.layers[l].groups.forEach((g, k) => {
          if (g.mixer === "recurrent") root.append(svg("rect", { x: 24 + (k * perGroup * cw) / span, y: l * ch + 1.3, width: (perGroup * cw) / span - 1, height: ch - 1.2, class: "converted" }));
        });
      });
      return el("figure", {}, el("h3", {}, title), root, el("figcaption", {}, `${fmt(lo)} (dark) to ${fmt(hi)} (bright)`));
    }

    function show(layer, head) {
      const h = heads.layers[layer].heads[head];
      const label = (b) => (b === 0 ? "0" : b === 1 ? "1" : `${2 ** (b - 1)}–${2 ** b - 1}`);
      const title = `Layer ${layer}, head ${head}: attention by distance` + (h.no_op ? " (no-op: almost all of it on the sinks)" : "");
      detail.replaceChildren(el("h3", {}, title), bars(h.mass_by_distance, label),
        el("p", { class: "dim" }, `recency 16/64/128: ${fmt(h.recency_ratio_16)} / ${fmt(h.recency_ratio_64)} / ${fmt(h.recency_ratio_128)}; sinks ${fmt(h.sink_mass)}; mean distance ${fmt(h.mean_distance)}; entropy ${fmt(h.entropy)}; previous token ${fmt(h.prev_token_mass)}`));
    }
  }

  function bars(values, label) {
    const w = 640, h = 170, bw = (w - 20) / Math.max(values.length, 1), top = Math.max(...values, 1e-9);
    const root = svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, role: "img", "aria-label": "bar chart" });
    values.forEach((v, i) => {
      const bh = (v / top) * (h - 44);
      const bar = svg("rect", { x: 10 + i * bw + 1, y: h - 26 - bh, width: Math.max(bw - 2, 1), height: bh, fill: "var(--accent)" });
      bar.append(svg("title", {}, `${label(i)}: ${fmt(v)}`));
      root.append(bar, svg("text", { x: 10 + (i + 0.5) * bw, y: h - 10, "text-anchor": "middle" }, label(i)),
        svg("text", { x: 10 + (i + 0.5) * bw, y: h - 30 - bh, "text-anchor": "middle" }, fmt(v)));
    });
    return root;
  }

  function histogram(values) {
    const n = 10, counts = new Array(n).fill(0);
    for (const v of values) counts[Math.min(n - 1, Math.max(0, Math.floor(v * n)))] += 1;
    return bars(counts, (i) => `${(i / n).toFixed(1)}–${((i + 1) / n).toFixed(1)}`);
  }

  // Learning curves -----------------------------------------------------------------------------------------------------------
  if (data.curves.length) {
    const s = section("Learning curves");
    const box = el("div", { class: "columns" });
    for (const c of data.curves) {
      if (c.points.length < 2) continue;
      const w = 480, h = 220, xs = c.points.map((p) => p[0]), ys = c.points.map((p) => p[1]).filter(Number.isFinite);
      const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
      const X = (v) => 56 + ((v - x0) / (x1 - x0 || 1)) * (w - 70), Y = (v) => h - 30 - ((v - y0) / (y1 - y0 || 1)) * (h - 50);
      const root = svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, role: "img", "aria-label": c.name });
      root.append(svg("polyline", { points: c.points.map((p) => `${X(p[0])},${Y(p[1])}`).join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5 }));
      for (const y of [y0, (y0 + y1) / 2, y1]) root.append(svg("text", { x: 50, y: Y(y) + 4, "text-anchor": "end" }, fmt(y)));
      for (const x of [x0, x1]) root.append(svg("text", { x: X(x), y: h - 12, "text-anchor": x === x0 ? "start" : "end" }, fmt(x)));
      box.append(el("figure", {}, el("h3", {}, c.name), root, el("figcaption", {}, `${c.y_label} against ${c.x_label}`)));
    }
    s.append(box);
  }

  // Generations --------------------------------------------------------------------------------------------------------------
  if (data.generations.length) {
    const s = section("Generations");
    for (const g of data.generations) {
      s.append(el("h3", {}, `Prompt: ${g.prompt}`));
      s.append(el("div", { class: "columns" }, ...g.texts.map(([name, text]) => el("div", {}, el("p", { class: "dim" }, name), el("div", { class: "box" }, text)))));
    }
  }

  if (data.commands.length) section("Commands").append(el("pre", {}, data.commands.join("\n")));
  if (data.environment.length) {
    const t = el("table");
    for (const [k, v] of data.environment) t.append(el("tr", {}, el("td", {}, k), el("td", {}, v)));
    section("Environment").append(t);
  }
})();
