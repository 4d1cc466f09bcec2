"""benchmarks/movielens_rows.py: rows are the pipeline's, and a SID is three tokens."""

from benchmarks import movielens_rows


def test_rows(base_model):
    rows = movielens_rows.pairs(7)
    assert len(rows) == 7
    tokenizer = movielens_rows.tokenizer_of(str(base_model))
    assert len(tokenizer("<a_0><b_17><c_255>")["input_ids"]) == 3
    for prompt, answer in rows:
        assert prompt and answer and answer not in prompt
