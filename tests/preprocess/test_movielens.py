"""MovieLens-100K.

Invariants: order by time, ties in file order, leave-one-out; films that nobody rated are left out, users with fewer than 3
ratings have no sample; every layout gives the same files; what is wrong with a source is one line, and nothing is written.
"""

import json

import pytest
from helpers import run_stage

from minionerec.common.errors import UserError
from preprocess.movielens import Options, main

RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
ROWS = [(1, 10, 5), (1, 30, 1), (2, 10, 1), (1, 20, 5), (2, 20, 2), (2, 30, 3), (1, 40, 9), (3, 10, 1)]


def write(folder, ratings=None, films=None):
    good = RATINGS + "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in ROWS)
    (folder / "ml-100k.inter").write_bytes(good.encode() if ratings is None else ratings)
    good = FILMS + "".join(f"{i}\tFilm {i}\t199{i // 10}\tDrama War\n" for i in (10, 20, 30, 40, 50))
    (folder / "ml-100k.item").write_bytes(good.encode() if films is None else films)
    return Options(output_dir=str(folder / "out"), input_dir=str(folder), max_history=2)


def test_by_hand(tmp_path):
    options = write(tmp_path)
    main(options)
    inter = {
        split: sorted((tmp_path / "out" / f"ml-100k.{split}.inter").read_text().splitlines()[1:])
        for split in ("train", "valid", "test")
    }
    # user 1: 30, 10, 20, 40 by time; user 2: 10, 20, 30; user 3 has one rating; ids are 0..3 for films 10..40 and 0..2 for the users
    assert inter == {"train": ["0\t2\t0"], "valid": ["0\t2 0\t1", "1\t0\t1"], "test": ["0\t2 0 1\t3", "1\t0 1\t2"]}
    items = json.loads((tmp_path / "out" / "ml-100k.item.json").read_text())
    assert len(items) == 4 and items["0"]["title"] == "Film 10 (1991)" and items["0"]["categories"] == "Drama, War"


def test_a_finished_run_is_skipped(tmp_path, capsys):
    main(write(tmp_path))
    before = (tmp_path / "out" / "ml-100k.item.json").stat().st_mtime_ns
    capsys.readouterr()
    main(write(tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "ml-100k.item.json").stat().st_mtime_ns == before


def test_films_without_year_or_class(tmp_path):
    films = FILMS + "".join(f"{i}\tFilm {i}\t\t\n" for i in (10, 20, 30, 40))
    main(write(tmp_path, films=films.encode()))
    items = json.loads((tmp_path / "out" / "ml-100k.item.json").read_text())
    assert items["3"] == {"title": "Film 40", "description": "", "brand": "", "categories": ""}


def rating(line: str) -> dict:
    return {"ratings": (RATINGS + "1\t10\t5\t1\n" + line).encode()}


def film(line: str) -> dict:
    return {"films": (FILMS + "10\tFilm\t1991\tDrama\n" + line).encode()}


BAD = {
    "no ratings": ({"ratings": RATINGS.encode()}, "read: no interaction is left"),
    "an empty file": ({"ratings": b""}, "ml-100k.inter: the file is empty"),
    "no time column": ({"ratings": b"user_id:token\titem_id:token\n1\t10\n"}, "no column 'timestamp', found"),
    "no item column": ({"films": b"movie_id:token\tmovie_title:token_seq\n1\tx\n"}, "no column 'item_id', found"),
    "no title column": (
        {"films": b"item_id:token\tclass:token_seq\n1\tx\n"},
        "no column of titles, found ['item_id', ",
    ),
    "a time that is none": (rating("1\t20\t5\tnoon\n"), "row 3, column timestamp: found 'noon'"),
    "an endless time": (rating("1\t20\t5\tinf\n"), "row 3, column timestamp: found 'inf'"),
    "no time": (rating("1\t20\t5\t\n"), "row 3, column timestamp: found ''"),
    "no user": (rating("\t20\t5\t1\n"), "row 3, column user_id: found '', expected an id"),
    "a row too short": (rating("1\t20\n"), "row 3, column timestamp: found ''"),
    "latin-1": ({"films": FILMS.encode() + "10\tCité\t\t\n".encode("latin-1")}, "line 2: found the byte 0xe9"),
    "an item twice": (film("20\tA\t\t\n10\tB\t\t\n"), "row 4, column item_id: found '10', expected each item once"),
    "unknown items": (film("20\tA\t\t\n"), "3 interactions are of items without a title, the first of item 30"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path, case):
    files, found = BAD[case]
    with pytest.raises(UserError) as refused:
        main(write(tmp_path, **files))
    assert found in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ml-100k.preprocess.run.json"]
    main(write(tmp_path))  # what failed does not refuse the corrected command


def test_the_command(tmp_path):
    done = run_stage("preprocess.movielens", "--output_dir", tmp_path, "--input_dir", tmp_path / "none", check=False)
    assert done.returncode == 2 and "none/ml-100k.inter: no such file or folder; check --input_dir" in done.stderr
    done = run_stage("preprocess.movielens", "--output_dir", tmp_path, "--max_history", 0, check=False)
    assert done.returncode == 2 and done.stderr == "error: --max_history 0: expected at least 1\n"
    assert not list(tmp_path.iterdir())
