// Fills the names and texts of a result file with markup. Usage: node hostile.mjs IN.json OUT.json
import { readFile, writeFile } from "node:fs/promises";

const ATTACK = `</script><script>globalThis.pwned = 1; document.title = "pwned"</script><img src=x onerror="globalThis.pwned = 1"><svg onload="globalThis.pwned = 1">"'\`<!--`;
const KEYS = new Set(["name", "description", "title", "summary", "text", "prompt", "command", "version", "commit", "cpu", "model", "task", "data_sha256", "weights", "criterion", "data", "precision", "features"]);
const attack = (value, key) => typeof value === "string" ? (KEYS.has(key) ? ATTACK : value) : Array.isArray(value) ? value.map((v) => attack(v, key === "texts" ? "text" : key))
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [key === "scores" ? ATTACK + k : k, attack(v, key === "texts" ? "text" : k)])) : value;

const [from, to] = process.argv.slice(2);
await writeFile(to, JSON.stringify(attack(JSON.parse(await readFile(from, "utf8")), "")));
