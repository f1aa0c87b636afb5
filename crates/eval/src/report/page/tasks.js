// Long-range tasks: right answers by context, with 95 % intervals.
function taskChart(t, contexts) {
  const draw = (width) => {
    const height = 240, left = 46, right = width - 10, top = 30, bottom = height - 44;
    const y = { scale: linearScale(0, 1, bottom, top), ticks: [0, 0.25, 0.5, 0.75, 1], text: (v) => `${100 * v}`, log: false };
    const slot = (right - left) / contexts.length, x = (c) => left + (contexts.indexOf(c) + 0.5) * slot;
    const spread = Math.min(18, (slot * 0.7) / Math.max(t.rows.length, 1));
    const children = [axes({ left, right, top, bottom, y, yName: "right, %", xTicks: contexts, xName: `${t.by}, tokens`, x })], marks = [];
    t.rows.forEach((row, index) => {
      const at = (c) => x(c) + (index - (t.rows.length - 1) / 2) * spread, share = (s) => s.correct / s.asked;
      if (row.scores.length > 1) children.push(svg("polyline", { class: "line faint", style: `stroke:${colour(index)}`, points: row.scores.map(([c, s]) => `${at(c)},${y.scale(share(s))}`).join(" ") }));
      for (const [c, s] of row.scores) {
        const [lo, hi] = [y.scale(s.low), y.scale(s.high)];
        const node = mark(svg("g", {}, svg("path", { class: "whisker", style: `stroke:${colour(index)}`, d: `M${at(c)},${lo}V${hi}M${at(c) - 4},${lo}h8M${at(c) - 4},${hi}h8` }), shape(index, at(c), y.scale(share(s)), 4.6)),
          `${row.model}\n${count(c)} tokens: ${s.correct} of ${s.asked}, ${percent(share(s))}\n95 % interval ${fixed(100 * s.low, 1)}–${fixed(100 * s.high, 1)} %`, index, c);
        children.push(node);
        marks.push(node);
      }
    });
    return { height, children, marks, description: `Share of right answers by ${t.by} for ${t.rows.map((r) => r.model).join(", ")}, with 95 % intervals.` };
  };
  return chart({ title: t.title, legend: legend(t.rows.map((r) => r.model), false), draw });
}

function tasksSection() {
  if (!data.tasks.length) return;
  const s = section("long-range", "Long-range tasks", "Share of right answers, the counts, and 95 % intervals (Wilson). Overlapping intervals tell little apart.");
  const grid = el("div", { class: "grid" });
  for (const t of data.tasks) {
    const contexts = [...new Set(t.rows.flatMap((r) => r.scores.map((x) => x[0])))].sort((a, b) => a - b);
    const cell = (row, c) => {
      const found = row.scores.find((x) => x[0] === c);
      if (!found) return DASH;
      const score = found[1];
      return el("span", { class: "score" }, percent(score.correct / score.asked, 0), small(`${score.correct}/${score.asked}`), small(`${fixed(100 * score.low, 0)}–${fixed(100 * score.high, 0)}`));
    };
    const rows = t.rows.map((row) => [row.model, ...contexts.map((c) => cell(row, c))]);
    grid.append(el("div", {}, taskChart(t, contexts), table(["model", ...contexts.map(count)], rows, { label: `${t.title} by ${t.by}` })));
  }
  s.append(grid);
}
