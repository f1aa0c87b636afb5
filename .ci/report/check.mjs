// Opens report pages in a headless Chromium as a reader would, and fails on anything a reader would notice.
// Usage: node check.mjs CHROMIUM PAGE.html HOSTILE.html FOLDER. PAGE has every section; HOSTILE was made from result files full of markup.
import assert from "node:assert/strict";
import { mkdir, stat } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, pageFile, hostileFile, folder] = process.argv.slice(2);
const SECTIONS = ["quality", "tradeoff", "long-range", "speed", "tables-0", "tables-1", "heads", "learning", "generations", "sources"];
const PHONE = { width: 400, height: 800 }, DESK = { width: 1200, height: 900 };
// WCAG 2.2: text against its ground.
const CONTRAST = 4.5;

await mkdir(folder, { recursive: true });
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
let checks = 0;
const check = (ok, what) => { assert.ok(ok, what); checks += 1; };

async function open(file, options) {
  const context = await browser.newContext({ viewport: DESK, reducedMotion: "reduce", ...options });
  const page = await context.newPage();
  const seen = { errors: [], requests: [], dialogs: 0 };
  page.on("console", (m) => { if (["error", "warning"].includes(m.type())) seen.errors.push(m.text()); });
  page.on("pageerror", (e) => seen.errors.push(e.message));
  page.on("dialog", (d) => { seen.dialogs += 1; d.dismiss(); });
  const url = pathToFileURL(path.resolve(file)).href;
  page.on("request", (r) => { if (r.url() !== url) seen.requests.push(r.url()); });
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("h1"));
  // Charts are drawn once their width is known.
  await page.waitForFunction(() => [...document.querySelectorAll(".plot")].every((p) => p.firstElementChild));
  return { page, seen, close: () => context.close() };
}
const shot = (page, name, fullPage = true) => page.screenshot({ path: path.join(folder, `${name}.png`), fullPage });
const quiet = ({ errors, requests, dialogs }, where) => {
  assert.deepEqual(errors, [], `${where}: console errors`);
  assert.deepEqual(requests, [], `${where}: network requests`);
  check(dialogs === 0, `${where}: a dialog opened`);
};
const overflow = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
const colours = (page) => page.evaluate(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  // Through a canvas, so that any notation of a colour becomes sRGB.
  const rgb = (value) => { canvas.fillStyle = value; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const of = (node, property) => rgb(getComputedStyle(node)[property]);
  return { ground: of(document.body, "backgroundColor"), text: of(document.body, "color"), dim: of(document.querySelector("p.dim"), "color"), tick: of(document.querySelector("svg .tick"), "fill"), link: of(document.querySelector("nav a"), "color") };
});
function contrast(a, b) {
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
}
function readable(found, where) {
  for (const name of ["text", "dim", "tick", "link"]) {
    const ratio = contrast(found[name], found.ground);
    check(ratio >= CONTRAST, `${where}: contrast of ${name} is ${ratio.toFixed(2)}`);
  }
}

async function sections(page) {
  for (const id of SECTIONS) {
    check(await page.locator(`section#${id} h2`).count() === 1, `section ${id} is missing`);
    check(await page.locator(`nav a[href="#${id}"]`).count() === 1, `no link to ${id}`);
  }
  check(await page.locator(".plot > svg").count() >= 8, "charts are missing");
  const bare = await page.evaluate(() => [...document.querySelectorAll(".plot > svg")].filter((s) => !s.querySelector(":scope > title")?.textContent.trim() || !s.querySelector(":scope > desc")?.textContent.trim()
    || !document.getElementById(s.getAttribute("aria-labelledby"))).length);
  check(bare === 0, `${bare} charts have no title or description`);
  const unnamed = await page.evaluate(() => [...document.querySelectorAll(".mark")].filter((m) => !m.getAttribute("aria-label")).length);
  check(unnamed === 0, `${unnamed} marks have no name`);
  const wrong = await page.evaluate(() => [...document.querySelectorAll("svg *")].filter((n) => [...n.attributes].some((a) => /NaN|undefined|Infinity/.test(a.value)) || (n.childElementCount === 0 && /NaN|undefined/.test(n.textContent))).length);
  check(wrong === 0, `${wrong} drawn values are no numbers`);
  check(!(await page.locator("main").textContent()).includes("[object"), "an object is shown as text");
  const ids = await page.evaluate(() => { const all = [...document.querySelectorAll("[id]")].map((n) => n.id); return all.length - new Set(all).size; });
  check(ids === 0, "an id occurs twice");
}

async function keyboard(page) {
  await page.evaluate(() => { document.activeElement?.blur(); window.scrollTo(0, 0); });
  await page.keyboard.press("Tab");
  check(await page.evaluate(() => document.activeElement.className === "skip"), "Tab does not come to the skip link first");
  await page.keyboard.press("Enter");
  check(await page.evaluate(() => document.activeElement.id === "page"), "the skip link does not lead to the page");
  // One Tab stop in each chart, wherever it stands.
  const stops = new Set();
  for (let i = 0; i < 400; i += 1) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => { const m = document.activeElement; return m.classList.contains("mark") ? m.closest("svg").getAttribute("aria-labelledby") : m === document.body ? "end" : null; });
    if (at === "end") break;
    if (at) { check(!stops.has(at), `${at} has two Tab stops`); stops.add(at); }
  }
  check(stops.size === await page.locator(".plot > svg").count(), `Tab reached ${stops.size} charts`);
  const mark = page.locator("#long-range .mark[tabindex='0']").first();
  await mark.focus();
  const label = () => page.evaluate(() => document.activeElement.getAttribute("aria-label"));
  const tip = () => page.evaluate(() => { const t = document.getElementById("tip"); return t.hidden ? null : t.textContent; });
  const first = await label();
  const covered = await page.evaluate(() => document.activeElement.getBoundingClientRect().top < document.querySelector("nav").getBoundingClientRect().bottom);
  check(!covered, "the focused value lies under the navigation");
  check((await tip())?.replaceAll("\n", ", ") === first, "focus shows no tooltip");
  await page.keyboard.press("ArrowRight");
  const second = await label();
  check(second !== first && (await tip())?.replaceAll("\n", ", ") === second, "an arrow key does not move to the next value");
  await page.keyboard.press("Escape");
  check(await tip() === null, "Escape does not hide the tooltip");
  // A head is chosen from the keyboard.
  const title = () => page.locator("#heads figure h3", { hasText: "attention by distance" }).textContent();
  const before = await title();
  await page.locator("#heads .cell[tabindex='0']").first().focus();
  for (const key of ["ArrowDown", "ArrowRight", "Enter"]) await page.keyboard.press(key);
  check(await title() !== before, "Enter does not choose a head");
  const name = await page.locator("#heads .plot > svg desc").first().textContent();
  await page.locator("#heads select").first().selectOption({ index: 3 });
  check(await page.locator("#heads .plot > svg desc").first().textContent() !== name, "another statistic is not drawn");
}

async function themes(page) {
  await page.emulateMedia({ colorScheme: "light" });
  const light = await colours(page);
  readable(light, "light");
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await colours(page);
  readable(dark, "dark");
  check(contrast(light.ground, dark.ground) > 10, "dark mode does not change the ground");
  const button = page.locator("button.theme");
  await button.click();
  check(await button.textContent() === "Theme: light", "the button does not say its theme");
  assert.deepEqual((await colours(page)).ground, light.ground, "the button does not overrule the system");
  await button.click();
  assert.deepEqual((await colours(page)).ground, dark.ground);
  await page.reload();
  check(await page.locator("button.theme").textContent() === "Theme: dark", "the choice is forgotten");
  await page.locator("button.theme").click();
}

// The whole page on a desk, light and dark.
{
  const { page, seen, close } = await open(pageFile, { colorScheme: "light" });
  await sections(page);
  check(await overflow(page) <= 0, "the page is wider than a desk");
  await shot(page, "light");
  await page.locator("#heads").scrollIntoViewIfNeeded();
  await keyboard(page);
  await themes(page);
  await page.emulateMedia({ colorScheme: "dark" });
  await page.evaluate(() => { document.activeElement?.blur(); window.scrollTo(0, 0); });
  await shot(page, "dark");
  quiet(seen, "desk");
  await close();
}
// A phone.
{
  const { page, seen, close } = await open(pageFile, { viewport: PHONE, deviceScaleFactor: 2, isMobile: true, hasTouch: true });
  check(await overflow(page) <= 0, `the page is ${await overflow(page)} pixels wider than a phone`);
  await page.locator("details").evaluateAll((all) => all.forEach((d) => { d.open = true; }));
  check(await overflow(page) <= 0, "an open table makes the page wider than a phone");
  await page.locator("details").evaluateAll((all) => all.forEach((d) => { d.open = false; }));
  await shot(page, "phone");
  quiet(seen, "phone");
  await close();
}
// Paper: from a dark screen it is printed light, without what only a screen needs.
{
  const { page, seen, close } = await open(pageFile, { colorScheme: "dark" });
  const pdf = path.join(folder, "print.pdf");
  await page.pdf({ path: pdf, format: "A4", printBackground: true, margin: { top: "14mm", bottom: "14mm", left: "14mm", right: "14mm" } });
  check((await stat(pdf)).size > 20_000, "the PDF holds little");
  await page.emulateMedia({ media: "print", colorScheme: "dark" });
  await page.setViewportSize({ width: 690, height: 980 });
  const found = await colours(page);
  check(found.ground.every((v) => v === 255), "paper is not white");
  for (const hidden of ["nav", "button.theme", ".controls"]) check(!(await page.locator(hidden).first().isVisible()), `${hidden} is printed`);
  check(await overflow(page) <= 0, "the page is wider than paper");
  await shot(page, "print");
  quiet(seen, "print");
  await close();
}
// Result files full of markup: it is shown, not run.
{
  const { page, seen, close } = await open(hostileFile, {});
  check(await page.evaluate(() => globalThis.pwned === undefined && !document.title.startsWith("pwned")), "a script from a result file ran");
  const strange = await page.evaluate(() => [...document.querySelectorAll("img, iframe, object, embed, link, form, a:not(nav a):not(.skip), script")].length);
  check(strange === 2, `${strange - 2} elements came from a result file`);
  const handlers = await page.evaluate(() => [...document.querySelectorAll("*")].filter((n) => [...n.attributes].some((a) => a.name.startsWith("on"))).length);
  check(handlers === 0, "an event handler came from a result file");
  check((await page.locator("main").textContent()).includes("<img src=x onerror="), "the text itself is shown");
  check(await overflow(page) <= 0, "hostile text makes the page wider");
  await shot(page, "hostile");
  quiet(seen, "hostile");
  await close();
}
await browser.close();
console.log(`report in a browser: ${checks} checks passed; screenshots in ${folder}`);
