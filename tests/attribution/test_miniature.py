"""Maps on the miniature, whose scenes say where each sentence's object belongs."""

import numpy as np
import pytest

from finelip_sdxl.comparison import Settings
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.miniature.captions import long_caption
from finelip_sdxl.miniature.world import PLACES, make_scene


@pytest.mark.slow
def test_sentences_act_where_their_objects_are_also_past_token_77() -> None:
    """The benchmark's figure, on one scene: of 200, more than 95 % of the sentences are found."""
    scene = make_scene("unseen-0")
    caption = long_caption(scene, "unseen-0")
    trace = Comparison.load("miniature").draw("finelip", Settings(caption.text, steps=12), traced=True).trace
    found = {(phrase.start, phrase.end): phrase for phrase in trace.phrases()}
    phrases = [found[mention.start, mention.end] for mention in caption.described]
    cells = [3 * int(3 * phrase.y) + int(3 * phrase.x) for phrase in phrases]
    hits = [cell == mention.index for cell, mention in zip(cells, caption.described, strict=True)]
    assert np.mean(hits) > 0.8  # one of nine may miss
    assert [phrase.place for phrase, hit in zip(phrases, hits, strict=True) if hit] == [
        PLACES[mention.index] for mention, hit in zip(caption.described, hits, strict=True) if hit
    ]
