"""What log-probabilities are normalised over. In a module without torch, so that `--help` and checks stay fast.

vocab     the whole vocabulary, as published work does
catalog   the tokens that the trie allows at a node
"""

SPACES = ("vocab", "catalog")
