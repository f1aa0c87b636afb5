"""Choices and last words scored by EleutherAI's lm-evaluation-harness itself, with the tiny `llama3` model.

Two tokenizers differ in one thing, whether every text begins with <s>. Their merges join spaces with letters, so that it shows where a context ends."""

import json
import random
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from goldens_common import save_json
from goldens_models import load

SPECIALS = ["<unk>", "<s>", "</s>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,'?!éü日-:;_"
MERGES = [("t", "h"), (" ", "th"), (" th", "e"), (" ", "a"), ("e", "r"), ("i", "n"), ("o", "u"), (" ", "s"), ("a", "t"),
          (".", "\n"), (" ", " ")]
CHOICES = [
    {"context": "the whale swam", "choices": ["in the sea", "on the moon", "under a chair"], "answer": 0},
    {"context": "a sailor saw ", "choices": ["the storm", "a ship"], "answer": 1},
    {"context": "two  spaces  ", "choices": ["the first", "then a second", "s"], "answer": 2},
    {"context": "a line ends.\n", "choices": ["the next", "another", "a", "it"], "answer": 0},
    {"context": "a no-break space\u00a0", "choices": ["the one", "a two"], "answer": 1},
    {"context": "a separator\x1c", "choices": ["the one", "a two"], "answer": 0},
    {"context": "", "choices": ["the whale", "a sailor", "nothing"], "answer": 2},
    {"context": "<s>the beginning is given", "choices": ["once", "twice", "a third time"], "answer": 1},
    {"context": "letters of two bytes:", "choices": ["ééééééé", "üüü", "eeeeeeeeee", "日日日日"], "answer": 3},
    {"context": "letters of three bytes:", "choices": ["日日", "aaaa", "日日日日日", "th"], "answer": 1},
    {"context": "a choice begins with a space", "choices": [" the", "  a", "the"], "answer": 2},
    {"context": "the same twice", "choices": ["thing", "thing", "s"], "answer": 1},
    {"context": "no delimiter is lost?", "choices": ["yes", "no"], "answer": 0},
    {"context": "UNKNOWN LETTERS", "choices": ["ONE", "two"], "answer": 1},
    {"context": "a long context is cut on the left. " * 12, "choices": ["so it is", "so be it, then"], "answer": 0},
    {"context": "one last thing:", "choices": ["a very long choice, much longer than all of the others", "it"], "answer": 0},
]
LASTWORDS = [
    "the whale swam in the sea", "a sailor saw the storm", "she said it again, and he said it again", "it was th",
    "the old captain turned to the harbour", "one", "a  doubled  space  the", "a line.\nanother line", "the end.",
    "in the end there was nothing", "letters like é and ü and 日", "a b", "<s>the beginning is given",
    "so long a text that its beginning is cut off, " * 8 + "then a word", "er er er er er er er",
    "in in in in in in in in", "the the the the the the", "a tin thin at",
]


def tokenizer() -> Tokenizer:
    entries = SPECIALS + list(CHARACTERS) + [a + b for a, b in MERGES]
    assert len(entries) == len(set(entries)) == 64
    out = Tokenizer(BPE(vocab={text: i for i, text in enumerate(entries)}, merges=MERGES, unk_token="<unk>"))
    out.add_special_tokens(SPECIALS)
    out.decoder = decoders.Fuse()
    return out


def task(name: str, path: Path, settings: dict) -> ConfigurableTask:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    metrics = [{"metric": m} for m in settings.pop("metrics")]
    return ConfigurableTask(config={"task": name, **data, "metric_list": metrics, **settings})


def evaluated(lm: HFLM, name: str, path: Path, settings: dict) -> tuple[dict, list]:
    """The results as numbers, and of every item its (log-likelihood, greedy) pairs."""
    out = lm_eval.simple_evaluate(model=lm, tasks=[task(name, path, settings)], log_samples=True, verbosity="ERROR")
    results = {key.replace(",none", ""): value for key, value in out["results"][name].items() if isinstance(value, float)}
    samples = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
    # Of every request one response.
    return results, [[[float(ll), bool(greedy)] for ((ll, greedy),) in sample["resps"]] for sample in samples]


@torch.no_grad()
def greedy_texts(model, inner: Tokenizer, count: int) -> list[str]:
    """Texts of random letters whose last word is what the model goes on with, of one token or two."""
    rng, found = random.Random(0), {1: [], 2: []}
    while min(map(len, found.values())) < count:
        context = " ".join("".join(rng.choices(CHARACTERS[:26], k=5)) for _ in range(3))
        ids = inner.encode(context).ids
        for length in (1, 2):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            text = inner.decode(ids, skip_special_tokens=False)
            word = text.removeprefix(context + " ")
            if word != text and word.isalpha() and inner.encode(text).ids == ids and len(found[length]) < count:
                found[length].append(text)
    return found[1] + found[2]


def make(root: Path) -> None:
    folder = root / "crates/eval/tests/data/likelihood"
    folder.mkdir(parents=True, exist_ok=True)
    model, plain, begun = load(root / "crates/model/tests/data/llama3"), tokenizer(), tokenizer()
    begun.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts = LASTWORDS + greedy_texts(model, plain, 3)
    for name, items in (("choice", CHOICES), ("lastword", [{"text": text} for text in texts])):
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    save_json(folder / "tokenizer.json", json.loads(plain.to_str()))
    out = {"lm_eval": lm_eval.__version__, "post_processor": json.loads(begun.to_str())["post_processor"]}
    for case, inner in (("plain", plain), ("bos", begun)):
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        lm = HFLM(pretrained=model, tokenizer=fast, batch_size=1, device="cpu")
        choice, choices = evaluated(lm, "choice", folder / "choice.jsonl", {
            "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
            "doc_to_target": "answer", "metrics": ["acc", "acc_norm", "acc_bytes"]})
        lastword, words = evaluated(lm, "lastword", folder / "lastword.jsonl", {  # as lambada_openai.yaml
            "output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}", "metrics": ["perplexity", "acc"]})
        out[case] = {"choice": choice, "choices": choices, "lastword": lastword, "words": [word for (word,) in words]}
        print(case, choice, lastword)
    save_json(folder / "goldens.json", out)
