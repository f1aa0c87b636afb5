"""Compares the command with transformers' frozen facts about SmolLM2: perplexity, greedy continuations, token ids.
Usage: check_real_model.py RECURFORMER TEXT, TEXT being the npm package's file named in crates/eval/tests/data/smollm2.json."""
import hashlib, json, pathlib, subprocess, sys, tempfile

PERPLEXITY_TOLERANCE = 1e-3  # 0.1 %: f32 sums in another order move the last digits only
CLOSE_CALL = 0.01  # log-probability: below this gap the best token is a matter of rounding

binary, text_path = sys.argv[1:]
golden = json.loads(pathlib.Path("crates/eval/tests/data/smollm2.json").read_text())


def run(*args):
    done = subprocess.run([binary, *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


text = pathlib.Path(text_path).read_bytes()
want = golden["perplexity"]
assert hashlib.sha256(text).hexdigest() == want["text"]["sha256"], "another edition of the text"
with tempfile.TemporaryDirectory() as folder:
    sample = pathlib.Path(folder, "moby.txt")
    sample.write_bytes(text[: want["text_bytes"]])
    got = run("eval", "ppl", "--model", "smollm2-135m", "--data", str(sample), "--context", str(want["context"]), "--max-tokens", str(want["tokens"]), "--json")
assert got["overall"]["tokens"] == want["scored"], (got["overall"]["tokens"], want["scored"])
ratio = got["overall"]["ppl"] / want["ppl"]
print(f"perplexity {got['overall']['ppl']:.4f}, transformers {want['ppl']:.4f}, ratio {ratio:.6f}")
assert abs(ratio - 1) < PERPLEXITY_TOLERANCE

ends = run("inspect", "smollm2-135m", "--json")["config"]["eos_token_ids"]
compared = 0
for case in golden["greedy"]:
    exact = ["--weights", "f32", "--kv-type", "f32"]
    got = run("generate", "--model", "smollm2-135m", *exact, "--prompt", case["prompt"], "--max-tokens", str(len(case["continuation"])), "--json")
    assert got["prompt_tokens"] == len(case["tokens"]), case["prompt"]
    shorter = len(got["tokens"]) < len(case["continuation"])
    for step, (mine, theirs, gap) in enumerate(zip(got["tokens"], case["continuation"], case["gaps"])):
        if mine != theirs:
            assert gap < CLOSE_CALL, (case["prompt"], step, mine, theirs, gap)
            break
        compared += 1
    else:
        # Ours ends at an end token, the golden run goes on.
        ended = shorter and case["continuation"][len(got["tokens"])] in ends
        assert ended or not shorter, (case["prompt"], "ended early", got["tokens"])
print(f"greedy continuations: {compared} tokens equal over {len(golden['greedy'])} prompts")
assert compared >= 10 * len(golden["greedy"])
