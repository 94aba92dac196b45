"""Prompts of the three lengths that matter: of a stock window, of a long window, and of more than one."""

import pytest

SHORT = "a red fox above the blue square"
LONG = " ".join([SHORT] * 20)  # 142 tokens
ENDLESS = " ".join([SHORT] * 60)  # 422
ALL_LENGTHS = pytest.mark.parametrize("prompt", [SHORT, LONG, ENDLESS], ids=["77", "248", "past-248"])

# More than 154 tokens, so that the last of the default buckets is used.
SENTENCES = "A large blue square of the quiet fox is above the hare. " * 14
