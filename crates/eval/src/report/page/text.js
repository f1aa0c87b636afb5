// Text: other tables, generations, where everything comes from.
function tablesSection() {
  if (!data.tables.length) return;
  const titles = [...new Set(data.tables.map((t) => t.section))];
  for (const [index, title] of titles.entries()) {
    const s = section(`tables-${index}`, title);
    for (const t of data.tables.filter((t) => t.section === title)) s.append(el("article", {}, el("h3", {}, t.title), el("p", { class: "dim" }, t.note), table(t.columns, t.rows, { cards: true, label: t.title })));
  }
}

function generationsSection() {
  if (!data.generations.length) return;
  const s = section("generations", "Generations", "The same prompt, continued by each model.");
  for (const g of data.generations) {
    s.append(el("article", {}, el("p", { class: "prompt" }, g.prompt), el("div", { class: "grid" }, g.texts.map(([name, text]) => el("div", {}, el("h3", {}, name), el("div", { class: "box", dir: "auto" }, text))))));
  }
}

function sourcesSection() {
  if (!data.sources.length) return;
  const s = section("sources", "Commands and versions", "The files this page was made of, and what they say of the runs that made them.");
  for (const f of data.sources) {
    const facts = [...f.facts];
    if (f.run) {
      const r = f.run;
      facts.push(["version", r.version + (r.commit ? `, commit ${r.commit}` : "")], ["date", r.date.replace("T", " ").replace("Z", " UTC")]);
      if (r.cpu) facts.push(["CPU", r.cpu]);
      facts.push(["threads", `${r.threads}, ${r.isa}`]);
      if (r.seeds && r.seeds.length) facts.push(["seed", r.seeds.join(", ")]);
      for (const m of r.models || []) facts.push(["model", `${m.name}: ${m.weights} weights, ${m.kv_type} cache` + (m.converted ? `, ${m.converted} of ${m.total} groups converted` : "")]);
    }
    s.append(el("div", { class: "source" }, el("h3", {}, f.path, " ", small(f.kind)), f.run ? el("pre", {}, f.run.command) : null,
      facts.length ? el("dl", {}, facts.map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])) : null));
  }
}
