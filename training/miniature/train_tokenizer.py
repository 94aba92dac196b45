"""Learns the merges of the miniature's tokenizer from the captions' words, and writes them to a file.

    python training/miniature/train_tokenizer.py --out finelip_sdxl/miniature/merges.txt

Only for a change of the captions' words, which no trained part survives: where two pairs are as frequent, their order,
and with it some ids, is another each time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature.captions import vocabulary
from finelip_sdxl.miniature.tokenizer import MERGES

# CLIP's pattern (arXiv 2103.00020): contractions, words, single digits, runs of other marks.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"of the package: {MERGES.name}")
    out = parser.parse_args().out
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(vocabulary(), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    with written_whole(out) as temporary:
        temporary.write_text("".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")


if __name__ == "__main__":
    main()
