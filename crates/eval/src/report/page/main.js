// Puts the page together.
const THEMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
function themeButton() {
  const store = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("theme", v); } catch { /* private windows keep nothing */ } } };
  const button = el("button", { type: "button", class: "theme" });
  const set = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = THEMES[theme];
    button.dataset.now = theme;
  };
  set(Object.keys(THEMES).includes(store.get()) ? store.get() : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES), next = names[(names.indexOf(button.dataset.now) + 1) % names.length];
    set(next);
    store.set(next);
  });
  return button;
}

const nav = el("nav", { "aria-label": "Sections" });
page.replaceChildren(el("header", {}, el("h1", {}, data.title), themeButton(), data.summary ? el("p", {}, data.summary) : null), nav);
qualitySection();
tasksSection();
speedSection();
tablesSection();
headsSection();
curvesSection();
generationsSection();
sourcesSection();
if (sections.length > 1) nav.append(el("ul", {}, sections.map(([id, title]) => el("li", {}, el("a", { href: `#${id}` }, title)))));
else nav.remove();
if (!sections.length) page.append(el("p", {}, "There is nothing to show."));
document.body.append(tip);
